"""Sequences packed one after the other in one row: their bounds, and any form run on each."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from retentive.errors import InputError


def sequence_bounds(cu_seqlens: Tensor, length: int) -> list[int]:
    """cu_seqlens as a list, checked to rise from 0 to `length`."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in pairwise(bounds)):
        raise InputError(
            f"cu_seqlens must rise from 0 to T = {length}, got {bounds[0]} … {bounds[-1]}"
            f"{'' if sorted(bounds) == bounds else ', not in order'}"
        )
    return bounds


def for_each_sequence(
    retention: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`retention` over every sequence by itself; an empty one hands its state on."""
    if cu_seqlens is None:
        return retention(q, k, v, log_decay, state, **options)
    outputs, finals = [], []
    for n, (start, stop) in enumerate(pairwise(sequence_bounds(cu_seqlens, q.shape[1]))):
        final = state[n : n + 1]
        if stop > start:
            tokens = (x[:, start:stop] for x in (q, k, v))
            o, final = retention(*tokens, log_decay, final, **options)
            outputs.append(o)
        finals.append(final)
    return torch.cat(outputs, dim=1), torch.cat(finals)
