"""A safetensors file written piece by piece: first its header, then each tensor at its place.

The place of every tensor is known from the shapes, so that they may come in any order and only one
of them is in memory. Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from retentive.convert.weight_files import DTYPE_NAMES, Stored
from retentive.errors import InputError


def check_room(folder: Path, tensors: Mapping[str, Stored]) -> None:
    """InputError where the disk has no room for the tensors: in a second, not after minutes."""
    needed = sum(stored.nbytes for stored in tensors.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"the weights take {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free;"
            " choose another place, or a smaller --dtype"
        )


def write_safetensors(
    path: Path, tensors: Mapping[str, Stored], stream: Iterable[tuple[str, Tensor]]
) -> None:
    """Write the file; `stream` gives each of `tensors` once, in any order.

    Its tensors are converted to the dtype that is said. InputError where that has no number as
    large as one of theirs, OSError where the disk is full.
    """
    # As the library orders them: wide dtypes first, so that every tensor is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places, end = {}, 0
    for name in names:
        stored = tensors[name]
        places[name], end = end, end + stored.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[stored.dtype],
            "shape": stored.shape,
            "data_offsets": [places[name], end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded = encoded.ljust(8 * math.ceil(len(encoded) / 8))
    with path.open("xb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        start = file.tell()
        for name, tensor in stream:
            stored = tensors[name]
            assert tuple(tensor.shape) == stored.shape, name
            file.seek(start + places.pop(name))
            values = _converted(name, tensor, stored.dtype)
            file.write(values.contiguous().flatten().view(torch.uint8).numpy().data)
        assert not places, places.keys()
        file.flush()
        os.fsync(file.fileno())


def _converted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    values = tensor.to(dtype)
    if values is not tensor and (values.isinf() & tensor.isfinite()).any():
        wider = "bfloat16" if dtype == torch.float16 else "float64"
        kind = str(dtype).removeprefix("torch.")
        raise InputError(
            f"{name} holds {tensor[tensor.isfinite()].abs().max():.3g}, more than {kind} can say"
            f" ({torch.finfo(dtype).max:.3g}); choose {wider}"
        )
    return values
