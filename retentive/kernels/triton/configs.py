"""Tile sizes, warps and stages of the retention kernels, and the choice among them.

At most 8 configurations a kernel for one (K, V, dtype) and GPU. Which are kept was decided by
`scripts/compile_kernels.py`: none spills a register, each fits the shared memory of its GPU. The
first launch for a (K, V, chunk size, dtype) times them and keeps the fastest; the length of a text
is no part of that key.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime import JITFunction

from retentive.kernels.triton.cases import SHARED_MEMORY

Configs = Callable[..., list[triton.Config]]


# triton's own are of other types in every version


def cdiv(n: int, by: int) -> int:
    """n / by, rounded up."""
    return -(-n // by)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is not below n."""
    return 1 << (n - 1).bit_length()


@cache
def tuned(kernel: Any, configs: Configs, X: int, Y: int, dtype, precision: str, device, *_: bool):
    """`kernel` with the fastest of `configs(X, Y, dtype, precision, shared)`, once it has run.

    What follows (REVERSE and such) makes kernels that are timed apart.
    """
    shared = LARGEST if device.type != "cuda" else _shared_memory(device)
    choices = configs(X, Y, dtype, precision, shared)
    if not isinstance(kernel, JITFunction):  # interpreted: there is no time to compare
        choices = choices[:1]
    return triton.autotune(choices, key=["chunk_size"])(kernel)


def _shared_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


LARGEST = SHARED_MEMORY[90]
LARGE = SHARED_MEMORY[80]


def state_configs(
    K: int, V: int, dtype: torch.dtype, precision: str, shared: int
) -> list[triton.Config]:
    """Of `states._carry`: blocks of K, of V and of tokens."""
    k, v = _block(K), _block(V)
    if dtype == torch.float32:
        if precision == "ieee":
            rows = [(32, 64, 32, 4, 2), (32, 32, 32, 4, 2)]
        else:
            rows = [(64, 64, 32, 4, 3), (64, 64, 32, 4, 2)]
    else:
        rows = [(64, 64, 64, 4, 3), (64, 128, 64, 4, 3), (64, 128, 64, 4, 2)]
        if shared >= LARGE:
            rows += [(128, 128, 64, 8, 3), (64, 256, 64, 8, 3)]
    names = ("BLOCK_K", "BLOCK_V", "BLOCK_T")
    return _configs(names, [(min(a, k), min(b, v), t, *rest) for a, b, t, *rest in rows])


def output_configs(
    X: int, Y: int, dtype: torch.dtype, precision: str, shared: int
) -> list[triton.Config]:
    """Of `output._read`: blocks of tokens m and n, of X in scores, of Y, and of X in the state."""
    x, y = _block(X), _block(Y)
    if dtype == torch.float32:
        if precision == "ieee":
            rows = [(32, 32, 32, 32, 4, 2), (32, 32, 16, 64, 4, 2)]
        else:
            rows = [(64, 32, 32, 64, 4, 2), (64, 64, 32, 64, 4, 2)]
    elif shared >= LARGEST:
        rows = [
            (64, 64, 64, 128, 4, 3),
            (64, 64, 128, 128, 4, 2),
            (128, 64, 64, 128, 8, 3),
            (64, 64, 64, 256, 8, 3),
            (64, 64, 256, 256, 8, 2),
            (128, 32, 32, 256, 8, 2),
            (64, 64, 32, 512, 8, 2),
        ]
    else:
        rows = [
            (64, 64, 32, 128, 4, 3),
            (64, 64, 64, 128, 8, 3),
            (64, 64, 32, 256, 8, 3),
            (64, 64, 64, 256, 8, 3),
        ]
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_X", "BLOCK_Y", "BLOCK_S")
    return _configs(
        names,
        [(m, n, min(a, x), min(b, y), min(64, a, x), *rest) for m, n, a, b, *rest in rows],
    )


def _configs(names: tuple[str, ...], rows: list[tuple[int, ...]]) -> list[triton.Config]:
    """Each row once: block sizes in the order of names, warps, stages."""
    return [
        triton.Config(dict(zip(names, row, strict=False)), num_warps=row[-2], num_stages=row[-1])
        for row in dict.fromkeys(rows)
    ]


def _block(width: int) -> int:
    """The smallest power of two that holds it and that a product takes."""
    return max(16, next_power_of_2(width))


DIMS = ((64, 128), (128, 256), (256, 512))
"""(K, V) of the models of 1.3B to 6.7B parameters; there is no harder one."""


class Specialization(NamedTuple):
    """What kernels are compiled for to be checked, and with how many of their configurations."""

    K: int
    V: int
    dtype: torch.dtype
    precision: str = "ieee"
    configurations: int | None = None  # None is all

    def __str__(self) -> str:
        kind = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[self.dtype]
        return f"{'tf32' if self.precision == 'tf32' else kind} K{self.K} V{self.V}"


SPECIALIZATIONS = (
    *(Specialization(K, V, torch.bfloat16) for K, V in DIMS),
    *(Specialization(K, V, torch.bfloat16, configurations=1) for K, V in ((16, 32), (80, 160))),
    Specialization(64, 128, torch.float16, configurations=1),  # as bfloat16
    Specialization(256, 512, torch.float32, "tf32"),
    Specialization(256, 512, torch.float32),
)


def describe(config: triton.Config) -> str:
    """Block sizes in the order of the kernel's arguments, warps and stages: "64x64x128 w4 s3"."""
    return f"{'x'.join(map(str, config.kwargs.values()))} w{config.num_warps} s{config.num_stages}"


def pointer(dtype: torch.dtype) -> str:
    """What a case calls a tensor of this dtype."""
    return {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
