"""Implementations of retention by name: what each can do, why it may not be had here, and how it is loaded.

`BACKENDS` is in order of preference; "auto" takes the first that supports the call. An entry loads its code when it is
first used, so that an accelerator's library is imported only where that accelerator is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from retentive.errors import InputError, nearest
from retentive.ops.packing import for_each_sequence

# (form, q, k, v, log_decay, state, cu_seqlens, chunk_size) -> (o, final state)
Run = Callable[
    [str, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, int | None], tuple[Tensor, Tensor]
]


@dataclass(frozen=True)
class Backend:
    summary: str
    refusal: Callable[[str, torch.device], str | None]
    """Why it cannot do this form on this device, or None where it can."""
    load: Callable[[], Run]


def _anywhere(form: str, device: torch.device) -> str | None:
    return None


def _load_torch() -> Run:
    from retentive.ops.chunkwise import chunkwise, default_chunk_size
    from retentive.ops.recurrent import step

    def run(
        form: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        state: Tensor,
        cu_seqlens: Tensor | None,
        chunk_size: int | None,
    ) -> tuple[Tensor, Tensor]:
        if form == "recurrent":
            return for_each_sequence(step, q, k, v, log_decay, state, cu_seqlens)
        if form == "parallel":  # one chunk
            chunk_size = q.shape[1]
        return chunkwise(
            q, k, v, log_decay, state, cu_seqlens, chunk_size or default_chunk_size(q, v)
        )

    return run


def _load_reference() -> Run:
    from retentive.ops import reference

    def run(
        form: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        state: Tensor,
        cu_seqlens: Tensor | None,
        chunk_size: int | None,
    ) -> tuple[Tensor, Tensor]:
        options = {"chunk_size": chunk_size or 64} if form == "chunkwise" else {}
        wide = (x.to(state.dtype) for x in (q, k, v))
        o, final = for_each_sequence(
            getattr(reference, form), *wide, log_decay, state, cu_seqlens, **options
        )
        return o.to(v.dtype), final

    return run


BACKENDS = {
    "torch": Backend(
        "explicit forward and backward in plain torch, any device", _anywhere, _load_torch
    ),
    "reference": Backend(
        "the paper in a page, slow and plain, any device", _anywhere, _load_reference
    ),
}

_loaded: dict[str, Run] = {}


def choose(name: str, form: str, device: torch.device) -> Run:
    """The backend asked for, loaded, or the first that can do `form` on `device` for "auto"."""
    if name == "auto":
        name = next(n for n, backend in BACKENDS.items() if backend.refusal(form, device) is None)
    elif name not in BACKENDS:
        raise InputError(
            f"unknown backend {name!r}{nearest(name, BACKENDS)}; choose auto or {_overview(form, device)}"
        )
    elif reason := BACKENDS[name].refusal(form, device):
        raise InputError(
            f"backend {name!r} cannot run here: {reason}; choose auto or {_overview(form, device)}"
        )
    if name not in _loaded:
        _loaded[name] = BACKENDS[name].load()
    return _loaded[name]


def _overview(form: str, device: torch.device) -> str:
    refusals = {name: backend.refusal(form, device) for name, backend in BACKENDS.items()}
    return ", ".join(
        name if reason is None else f"{name} (not here: {reason})"
        for name, reason in refusals.items()
    )
