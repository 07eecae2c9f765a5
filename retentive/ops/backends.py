"""Implementations of retention by name: what each can do and why one may not be had here.

`BACKENDS` is in order of preference; "auto" takes the first that supports the call. One that needs
a library beyond torch imports it inside its `run`, so that it is loaded only where it is used.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from retentive.errors import InputError, nearest
from retentive.ops import reference
from retentive.ops.chunkwise import chunkwise, default_chunk_size
from retentive.ops.packing import for_each_sequence
from retentive.ops.recurrent import step
from retentive.ops.states import empty_state

# (form, q, k, v, log_decay, state, cu_seqlens, chunk_size) -> (o, final state)
Run = Callable[
    [str, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, int | None],
    tuple[Tensor, Tensor],
]


@dataclass(frozen=True)
class Backend:
    summary: str
    run: Run
    refusal: Callable[[str, torch.device], str | None] = lambda form, device: None
    """Why it cannot do this form on this device; None where it can."""


def _torch(
    form: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    if form == "recurrent":
        state = empty_state(q, v, cu_seqlens) if state is None else state
        return for_each_sequence(step, q, k, v, log_decay, state, cu_seqlens)
    if form == "parallel":
        chunk_size = q.shape[1]  # one chunk is the parallel form
    chunk_size = chunk_size or default_chunk_size(q, v)
    o, final, _ = chunkwise(q, k, v, log_decay, state, cu_seqlens, chunk_size)
    return o, final


def _reference(
    form: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    options = {"chunk_size": chunk_size or 64} if form == "chunkwise" else {}
    state = empty_state(q, v, cu_seqlens) if state is None else state
    dtype, run = state.dtype, getattr(reference, form)
    o, final = for_each_sequence(
        run, q.to(dtype), k.to(dtype), v.to(dtype), log_decay, state, cu_seqlens, **options
    )
    return o.to(v.dtype), final


BACKENDS = {
    "torch": Backend("explicit forward and backward in plain torch, any device", _torch),
    "reference": Backend("the paper in a page, slow and plain, any device", _reference),
}


def choose(name: str, form: str, device: torch.device) -> Run:
    """The backend asked for, or the first that can do `form` on `device` for "auto"."""
    if name == "auto":
        return next(b.run for b in BACKENDS.values() if b.refusal(form, device) is None)
    if name not in BACKENDS:
        raise InputError(
            f"unknown backend {name!r}{nearest(name, BACKENDS)}; "
            f"choose auto or one of {_overview(form, device)}"
        )
    if reason := BACKENDS[name].refusal(form, device):
        raise InputError(
            f"backend {name!r} cannot run here: {reason}; "
            f"choose auto or one of {_overview(form, device)}"
        )
    return BACKENDS[name].run


def _overview(form: str, device: torch.device) -> str:
    refusals = {name: backend.refusal(form, device) for name, backend in BACKENDS.items()}
    return ", ".join(
        name if reason is None else f"{name} (not here: {reason})"
        for name, reason in refusals.items()
    )
