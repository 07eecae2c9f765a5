"""LoRA (arXiv 2106.09685) through PEFT: W + (α/r) B A with A `[r,in]` and B `[out,r]` trained.

The folder is PEFT's own: `adapter_config.json` and `adapter_model.safetensors`, whose metadata
names the model's fingerprint, too, which PEFT does not read.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from retentive.adapters.base import check_base
from retentive.errors import InputError, nearest
from retentive.io.atomic import write_text
from retentive.io.tensors import read_tensors, write_tensors
from retentive.models.build import empty_model
from retentive.models.config import ModelConfig
from retentive.models.fingerprint import fingerprint
from retentive.models.language_model import LanguageModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of the names in PEFT's files
_ADAPTER = "default"  # PEFT's name for the only one


class Lora:
    """Matrices beside the linear layers of a model, which is frozen and stays what it was at first.

    targets: names of linear layers, such as q_proj; without any, all projections of all layers.
    """

    files = (CONFIG, WEIGHTS)

    def __init__(
        self,
        model: LanguageModel,
        source: str,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        targets: Sequence[str] = (),
    ):
        """`source`: the model's folder. InputError as `check_targets`."""
        peft = _peft()
        self.model, self.base, self.source = model, fingerprint(model), source
        self.config = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=_targets(model, targets),
            task_type="CAUSAL_LM",
        )
        peft.inject_adapter_in_model(self.config, model)

    def save(self, folder: Path) -> None:
        fields = self.config.to_dict()
        fields |= {"base_model_name_or_path": self.source, "inference_mode": True}
        tensors = {_PREFIX + name: tensor for name, tensor in _tensors(self.model).items()}
        write_tensors(folder / WEIGHTS, tensors, {"format": "pt", "fingerprint": self.base})
        write_text(folder / CONFIG, json.dumps(fields, indent=2, sort_keys=True, default=sorted))

    def restore(self, folder: Path) -> None:
        """The values that were saved. InputError if those are another model's."""
        tensors, base = read(folder)
        if base is not None:
            check_base(folder, base, self.base)
        _fill(self.model, folder, tensors)


def check_targets(config: ModelConfig, targets: Sequence[str]) -> None:
    """InputError for a target that such a model has not, and without PEFT."""
    _peft()
    _targets(empty_model(config), targets)


def read(folder: Path) -> tuple[dict[str, Tensor], str | None]:
    """The matrices and the fingerprint of their model: None where PEFT itself wrote the folder."""
    tensors, metadata = read_tensors(folder / WEIGHTS, "adapter file")
    return tensors, metadata.get("fingerprint")


@torch.no_grad()
def merge(model: LanguageModel, folder: Path, tensors: dict[str, Tensor]) -> LanguageModel:
    """The model with W + (α/r) B A for W, in place. InputError for what PEFT cannot merge into it.

    `tensors`: what `read` gives of `folder`, which may be of any LoRA that PEFT knows.
    """
    peft = _peft()
    _check_kind(folder)
    try:
        tuner = peft.LoraModel(model, peft.LoraConfig.from_pretrained(str(folder)), _ADAPTER)
    except ValueError as error:
        said = str(error).splitlines()[0]
        raise InputError(f"{folder / CONFIG} does not fit the model: {said}") from error
    _fill(model, folder, tensors)
    return tuner.merge_and_unload().requires_grad_()


def _targets(model: LanguageModel, asked: Sequence[str]) -> list[str]:
    projections, known = _linear_names(model.layers), _linear_names(model)
    for name in asked:
        if name not in known:
            near = nearest(name, known)
            raise InputError(
                f"adapter.targets has {name!r}{near}; this model has {', '.join(sorted(known))}"
            )
    return sorted(asked or projections)


def _linear_names(module: nn.Module) -> set[str]:
    """The last parts: q_proj for layers.0.retention.q_proj."""
    return {
        name.rpartition(".")[2]
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear)
    }


def _tensors(model: LanguageModel) -> dict[str, Tensor]:
    return _peft().get_peft_model_state_dict(model, save_embedding_layers=False)


def _fill(model: LanguageModel, folder: Path, tensors: dict[str, Tensor]) -> None:
    """InputError for tensors that the model's matrices are not."""
    given = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    wanted = _tensors(model)
    for name in sorted(wanted.keys() | given.keys()):
        found, taken = (
            list(each[name].shape) if name in each else "missing" for each in (given, wanted)
        )
        if found != taken:
            raise InputError(
                f"the adapter in {folder} is another model's: {name} is {found}, where this one "
                f"has {taken}; give the model folder that it was trained on"
            )
    _peft().set_peft_model_state_dict(model, given)


def _check_kind(folder: Path) -> None:
    try:
        kind = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("peft_type")
    except (ValueError, AttributeError):
        raise InputError(f"{folder / CONFIG} is truncated or no JSON; fetch it again") from None
    if kind != "LORA":
        raise InputError(
            f"{folder} holds a PEFT adapter of type {kind!r}; this package merges LORA only"
        )


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError:
        raise InputError('LoRA takes PEFT: pip install "retentive[hf]"') from None
    return peft
