"""Sequences and their states, for ops and kernels alike: bounds of packed ones, sizes and dtypes.

Shapes as in `retentive.ops`.
"""

from itertools import pairwise

import torch
from torch import Tensor

from retentive.errors import InputError


def state_dtype(q: Tensor) -> torch.dtype:
    """Of states and of all products: float64 for float64 inputs, float32 for any other."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def state_shape(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int, int]:
    """`[N,H,K,V]` for q `[B,T,H,K]` and v `[B,T,H,V]`."""
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return sequences, q.shape[2], q.shape[3], v.shape[3]


def empty_state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return q.new_zeros(state_shape(q, v, cu_seqlens), dtype=state_dtype(q))


def sequence_bounds(cu_seqlens: Tensor, length: int) -> list[int]:
    """cu_seqlens as a list, checked to rise from 0 to `length`."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in pairwise(bounds)):
        raise InputError(
            f"cu_seqlens must rise from 0 to T = {length}, got {bounds[0]} … {bounds[-1]}"
            f"{'' if sorted(bounds) == bounds else ', not in order'}"
        )
    return bounds
