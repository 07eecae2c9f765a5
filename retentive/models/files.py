"""Tensors on disk (safetensors), and the fingerprint that ties a saved state to its weights."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from retentive.errors import InputError

if TYPE_CHECKING:
    from retentive.models.language_model import LanguageModel


def write_text(path: str | Path, text: str) -> None:
    """Write aside and rename: whoever reads `path` finds the old file or the new one, whole."""
    path = Path(path)
    aside = _aside(path)
    try:
        aside.write_text(text, encoding="utf-8")
        _replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """As `write_text`. Raises OSError with the path where the disk is full or read-only."""
    from safetensors import SafetensorError  # here: a model in memory needs torch only
    from safetensors.torch import save_file

    path = Path(path)
    aside = _aside(path)
    held = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(held, aside, metadata)
        _replace(aside, path)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        number = int(code.group(1))
        raise OSError(number, os.strerror(number), str(path)) from error
    finally:
        aside.unlink(missing_ok=True)


def read_tensors(
    path: str | Path, what: str, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a safetensors file.

    Raises InputError where the file is missing or broken; `what` says which file it is.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise InputError(f"{what} {path} does not exist")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            # Cloned: as they are mapped from the file they are not aligned, and matrix products of
            # unaligned weights differ in the last bit. A resumed run must not.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise InputError(
            f"{what} {path} is truncated or no safetensors file ({error}); write or fetch it again"
        ) from error


def fingerprint(model: "LanguageModel", samples: int = 64) -> str:
    """The weights' dtype and a hash of the config and of evenly spaced samples of every weight.

    As "float32:...". Quick for a model of any size; every step of training changes it.
    """
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().flatten()
        step = max(1, flat.numel() // samples)
        values = flat[::step][:samples].to("cpu", torch.float64)
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return f"{str(model.dtype).removeprefix('torch.')}:{digest.hexdigest()}"


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _replace(aside: Path, path: Path) -> None:
    """Rename once the bytes are on the disk: a crash of the machine leaves whole files, too."""
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)
