"""The state of retention: its dtype, and the one of a sequence of which nothing has been read."""

import torch
from torch import Tensor


def state_dtype(q: Tensor) -> torch.dtype:
    """Of states and of all products: float64 for float64 inputs, float32 for any other."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def state_shape(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int, int]:
    """`[N,H,K,V]` for q `[B,T,H,K]` and v `[B,T,H,V]`."""
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return sequences, q.shape[2], q.shape[3], v.shape[3]


def empty_state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return q.new_zeros(state_shape(q, v, cu_seqlens), dtype=state_dtype(q))
