"""What every kernel is compiled for; `scripts/compile_kernels.py` compiles and checks each case.

A module of kernels has `cases(capability)`, which yields one `Case` for each configuration that it
launches on a GPU of that compute capability (80, 89, 90, 100), and is named in MODULES.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

MODULES = ("states", "output", "rotation", "norm_gate", "decode")

OPTIONS = {"enable_fp_fusion": True}
"""Said at every launch, since the default of Triton changes with 3.10 (3.9 warns of it)."""

SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes that a block may have, by compute capability (CUDA programming guide)."""


@dataclass(frozen=True)
class Case:
    name: str
    kernel: Any  # a `triton.jit` function
    types: Mapping[str, str | None]
    """Of the arguments that are no constexpr: "*bf16", "*fp32", "i32"; None where None is given."""
    constants: Mapping[str, object]  # the constexpr arguments
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: bool = False
    """It must use the newest matrix instruction of the GPU (wgmma on sm_90)."""
    quick: bool = False
    """One of the few that `make test` compiles."""


def cases(capability: int) -> Iterator[Case]:
    for module in MODULES:
        yield from import_module(f"retentive.kernels.triton.{module}").cases(capability)
