"""A model folder: `config.json` and `model.safetensors`, written whole or not at all."""

import json
from pathlib import Path
from typing import Any

import torch

from retentive.devices import resolve_device, resolve_dtype
from retentive.errors import InputError
from retentive.io.atomic import write_text
from retentive.io.tensors import read_tensors, write_tensors
from retentive.models.build import empty_model
from retentive.models.config import ModelConfig, config_from_dict
from retentive.models.fingerprint import fingerprint
from retentive.models.language_model import LanguageModel
from retentive.models.state import ModelState

CONFIG = "config.json"
WEIGHTS = "model.safetensors"

__all__ = ["fingerprint", "load", "load_config", "load_state", "save_model"]


def save_model(model: LanguageModel, folder: str | Path) -> None:
    """Write the two files, each aside and renamed. A tied head is left out.

    Raises InputError for a model whose texts begin with a tuned state.
    """
    model.check_storable()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, dict(model.state_dict()), {"format": "pt"})
    write_text(folder / CONFIG, json.dumps(model.config.to_dict(), indent=2) + "\n")


def load(folder: str | Path, *, device: str = "cpu", dtype: str = "float32") -> LanguageModel:
    """The model of a folder, in eval mode. InputError where a file is missing or does not fit."""
    where, kind = resolve_device(device), resolve_dtype(dtype)
    config = load_config(folder)
    model = empty_model(config)
    path = Path(folder) / WEIGHTS
    tensors, _ = read_tensors(path, "model file", where)
    _check_fit(path, model, tensors)
    as_stored = {name for name, _ in model.named_buffers()}  # quantised
    for name in tensors.keys() - as_stored:
        tensors[name] = tensors[name].to(kind)
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(config.quantization is None).to(where).eval()


def load_state(
    path: str | Path, model: LanguageModel
) -> tuple[ModelState, dict[str, Any], dict[str, torch.Tensor]]:
    """A saved state of `model`, on its device, and the `extra` and `tensors` saved with it.

    Raises InputError where the file is missing or broken, or of another model or other weights.
    """
    restore = [block.mixer.restore_state for block in model.blocks]
    state, extra, tensors = ModelState.load(path, fingerprint=fingerprint(model), restore=restore)
    return state.to(model.device), extra, tensors


def load_config(folder: str | Path) -> ModelConfig:
    """The config in a model folder."""
    if not Path(folder).is_dir():
        raise InputError(f"no model folder {folder}; give one that holds {CONFIG} and {WEIGHTS}")
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise InputError(
            f"{folder} holds no {CONFIG}; give a folder that a training run or save_model wrote"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"{path} is truncated or no JSON ({error}); write or fetch it again"
        ) from error
    if not isinstance(fields, dict):
        raise InputError(f"{path} holds no object of config fields; write or fetch it again")
    try:
        return config_from_dict(fields)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _check_fit(path: Path, model: LanguageModel, tensors: dict[str, torch.Tensor]) -> None:
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if missing := expected.keys() - given.keys():
        raise InputError(
            f"{path} lacks {len(missing)} of the model's tensors, such as {min(missing)}; {_ADVICE}"
        )
    if unknown := given.keys() - expected.keys():
        raise InputError(
            f"{path} holds {len(unknown)} tensors too many, such as {min(unknown)}; {_ADVICE}"
        )
    for name, shape in expected.items():
        if given[name] != shape:
            raise InputError(
                f"{path} holds {name} as {given[name]}, {CONFIG} says {shape}; {_ADVICE}"
            )


_ADVICE = f"{CONFIG} and {WEIGHTS} must come from one model"
