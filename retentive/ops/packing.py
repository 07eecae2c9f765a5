"""Any form of retention run on each of the sequences that are packed in one row."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from retentive.sequences import sequence_bounds


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
