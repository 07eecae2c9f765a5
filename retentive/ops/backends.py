"""Implementations of retention by name: what each can do and why one may not be had here.

`BACKENDS` is in order of preference; "auto" takes the first that supports the call. One that needs
a library beyond torch imports it inside its `run`, so that it is loaded only where it is used.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from retentive.errors import InputError, nearest
from retentive.kernels.triton import available
from retentive.ops import reference
from retentive.ops.chunkwise import chunkwise, default_chunk_size
from retentive.ops.packing import for_each_sequence
from retentive.ops.recurrent import step
from retentive.sequences import empty_state
from retentive.transforms import transformed

# (form, q, k, v, log_decay, state, cu_seqlens, chunk_size) -> (o, final state)
Run = Callable[
    [str, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, int | None],
    tuple[Tensor, Tensor],
]
# (form, q, v, chunk_size) -> why it cannot do this, or None
Refusal = Callable[[str, Tensor, Tensor, int | None], str | None]


@dataclass(frozen=True)
class Backend:
    summary: str
    run: Run
    refusal: Refusal = lambda form, q, v, chunk_size: None
    auto_on: str | None = None
    """The kind of device where "auto" may take it; None is any."""
    recurrent: bool = True
    """Whether it has the recurrent form."""


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
    if transformed(q, k, v, state) and form != "recurrent":
        return _reference(form, q, k, v, log_decay, state, cu_seqlens, chunk_size)
    if form == "recurrent":
        state = empty_state(q, v, cu_seqlens) if state is None else state
        return for_each_sequence(step, q, k, v, log_decay, state, cu_seqlens)
    if form == "parallel":
        chunk_size = q.shape[1]  # one chunk is the parallel form
    chunk_size = chunk_size or default_chunk_size(q, v)
    o, final, _ = chunkwise(q, k, v, log_decay, state, cu_seqlens, chunk_size)
    return o, final


def _triton(
    form: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    if transformed(q, k, v, state):
        return _reference(form, q, k, v, log_decay, state, cu_seqlens, chunk_size)
    from retentive.kernels.triton.chunkwise import chunkwise, default_chunk_size

    chunk_size = chunk_size or default_chunk_size(v)
    return chunkwise(q, k, v, log_decay, state, cu_seqlens, chunk_size)


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
    "triton": Backend(
        "kernels for NVIDIA GPUs, chunkwise form",
        _triton,
        available.refusal,
        auto_on="cuda",
        recurrent=False,
    ),
    "torch": Backend("explicit forward and backward in plain torch, any device", _torch),
    "reference": Backend("the paper in a page, slow and plain, any device", _reference),
}


def has_recurrent_form(name: str) -> bool:
    """Whether the backend of this name has it; "auto" finds one that has."""
    return name not in BACKENDS or BACKENDS[name].recurrent


def choose(name: str, form: str, q: Tensor, v: Tensor, chunk_size: int | None) -> Run:
    """The backend asked for, or for "auto" the first that does this on the device of q."""
    call = (form, q, v, chunk_size)
    if name == "auto":
        here = (b for b in BACKENDS.values() if b.auto_on in (None, q.device.type))
        return next(backend.run for backend in here if backend.refusal(*call) is None)
    if name not in BACKENDS:
        raise InputError(
            f"unknown backend {name!r}{nearest(name, BACKENDS)}; "
            f"choose auto or one of {_able(call)}"
        )
    if reason := BACKENDS[name].refusal(*call):
        raise InputError(
            f"backend {name!r} cannot do this: {reason}; choose auto or one of {_able(call)}"
        )
    return BACKENDS[name].run


def _able(call: tuple[str, Tensor, Tensor, int | None]) -> str:
    return ", ".join(name for name, b in BACKENDS.items() if b.refusal(*call) is None)
