"""Tensors on disk (safetensors)."""

import os
import re
from pathlib import Path

import torch
from torch import Tensor

from retentive.errors import InputError
from retentive.io.atomic import aside_of, replace_synced


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """As `io.atomic.write_text`. OSError, with the path, where the disk is full or read-only."""
    from safetensors import SafetensorError  # here: a model in memory needs torch only
    from safetensors.torch import save_file

    path = Path(path)
    aside = aside_of(path)
    held = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        aside.touch()  # by the umask; the library makes files for their owner alone
        mode = aside.stat().st_mode
        save_file(held, aside, metadata)
        aside.chmod(mode)
        replace_synced(aside, path)
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
