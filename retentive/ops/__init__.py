"""Retention as a function of tensors: arguments are checked here, form and backend are chosen.

Legend, here and everywhere: B batch rows, T tokens, N sequences, H heads, K query/key head dim,
V value head dim, D model width, C chunk.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from retentive.errors import InputError, nearest
from retentive.ops import backends
from retentive.ops.backends import BACKENDS
from retentive.ops.recurrent import step
from retentive.sequences import state_dtype, state_shape

FORMS = ("parallel", "recurrent", "chunkwise")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

__all__ = ["BACKENDS", "DTYPES", "FORMS", "retention", "retention_step"]


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    form: str = "auto",
    chunk_size: int | None = None,
    backend: str = "auto",
    output_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """o_n = Σ_{m≤n} γ^(n-m) (q_n·k_m) v_m + γ^(n+1) q_n S_0, and the last state (paper §2.1-2.3).

    No rotation, no scale, no norm: q and k come rotated, k (or q) comes scaled. Every form gives
    the same result.

    Args:
        q, k, v: `[B,T,H,K]` twice and `[B,T,H,V]`, in one dtype of DTYPES.
        log_decay: `[H]`, natural log of each head's γ, ≤ 0; 0 is no decay. It gets no gradient.
        state: `[N,H,K,V]`, S_0 of each sequence, in float32 (float64 for float64 inputs). None is
            zeros. N is B without cu_seqlens.
        cu_seqlens: int32 or int64 `[N+1]`, rising from 0 to T, for N sequences packed in one row
            (B = 1). An empty sequence hands its state on. A CPU tensor saves a device stall.
        form: "parallel" (O(T²)), "recurrent" (token by token), "chunkwise" (O(T)), or "auto".
        chunk_size: C of the chunkwise form; by default chosen from K, V and T.
        backend: an implementation by name (see BACKENDS), or "auto": on NVIDIA GPUs the kernels of
            "triton" where they can do it, else "torch".
        output_state: whether to return the final state.

    Returns:
        o `[B,T,H,V]` in v's dtype and the final state `[N,H,K,V]`, or None if not asked for.
        Gradients reach q, k, v and state, from o and from the final state.

    Raises:
        InputError: shapes, dtypes or devices that do not fit together; a form or backend that is
            unknown or cannot do this. What is asked for by name is done or refused.
    """
    _check_tokens(q, k, v, log_decay)
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, q)
    if state is not None:
        _check_state(state, q, v, cu_seqlens)
    form = _choose_form(form, backend, chunk_size, q, k, v, state)
    run = backends.choose(backend, form, q, v, chunk_size)
    with _without_autocast(q.device):
        rates = log_decay.to(state_dtype(q))
        o, final = run(form, q, k, v, rates, state, cu_seqlens, chunk_size)
    return o, final if output_state else None


def retention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    *,
    active: Tensor | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """The recurrent form for a few tokens of each row: S_n = γ S_{n-1} + k_nᵀ v_n, o_n = q_n S_n.

    Args:
        q, k, v, log_decay, state: as in `retention`; state `[B,H,K,V]`.
        active: bool `[B]`; an inactive row neither decays nor advances, and its o is zero.
        inplace: write the new state over `state`; then nothing may require a gradient.

    Returns:
        o `[B,T,H,V]` in the dtype of v and the state `[B,H,K,V]` after the last token.

    Raises:
        InputError: shapes, dtypes or devices that do not fit together.
    """
    _check_tokens(q, k, v, log_decay)
    _check_state(state, q, v, None)
    if active is not None and (active.dtype != torch.bool or active.shape != (q.shape[0],)):
        raise InputError(
            f"active must be bool [B] = [{q.shape[0]}], one a row, got {_describe(active)}"
        )
    if inplace and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, state)):
        raise InputError(
            "inplace=True writes over what a gradient needs; use inplace=False or torch.no_grad()"
        )
    with _without_autocast(q.device):
        return step(q, k, v, log_decay.to(state.dtype), state, active=active, inplace=inplace)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Products are formed in the dtype of the state; autocast would form them in a lower one."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def _check_tokens(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> None:
    if q.ndim != 4 or k.shape != q.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise InputError(
            "q and k must be [B,T,H,K] and v [B,T,H,V], "
            f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    if 0 in q.shape or 0 in v.shape:
        raise InputError(
            f"q {list(q.shape)} and v {list(v.shape)} hold no token; give at least one"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise InputError(
            f"q, k and v must share one dtype of {allowed}, got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not q.device == k.device == v.device == log_decay.device:
        raise InputError(
            "q, k, v and log_decay must be on one device, "
            f"got {q.device}, {k.device}, {v.device}, {log_decay.device}"
        )
    _check_log_decay(log_decay, q.shape[2])


def _check_log_decay(log_decay: Tensor, heads: int) -> None:
    if log_decay.ndim == 3:
        raise InputError(
            "a log_decay of [B,T,H] is reserved for gated retention; give one value a head, [H]"
        )
    if log_decay.shape != (heads,) or not log_decay.is_floating_point():
        raise InputError(
            f"log_decay must be floating point [H] = [{heads}], got {_describe(log_decay)}"
        )
    if log_decay.requires_grad:
        raise InputError(
            "log_decay gets no gradient: the decay of retention is fixed; pass log_decay.detach()"
        )
    # Reading a value would break a graph, and on an accelerator stall it.
    readable = log_decay.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and log_decay.max() > 0:
        raise InputError(
            f"log_decay must be ≤ 0, got {log_decay.max().item():g}; it is the natural log of γ ≤ 1"
        )


def _check_cu_seqlens(cu_seqlens: Tensor, q: Tensor) -> None:
    if (
        cu_seqlens.ndim != 1
        or len(cu_seqlens) < 2
        or cu_seqlens.dtype not in (torch.int32, torch.int64)
    ):
        raise InputError(f"cu_seqlens must be int32 or int64 [N+1], got {_describe(cu_seqlens)}")
    if q.shape[0] != 1:
        raise InputError(
            f"with cu_seqlens the sequences are packed in one row: B must be 1, got {q.shape[0]}"
        )


def _check_state(state: Tensor, q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    shape, dtype = state_shape(q, v, cu_seqlens), state_dtype(q)
    if state.shape != shape or state.dtype != dtype or state.device != q.device:
        raise InputError(
            f"state must be {str(dtype).removeprefix('torch.')} [N,H,K,V] = {list(shape)} "
            f"on {q.device}, got {_describe(state)} on {state.device}"
        )


def _choose_form(
    form: str,
    backend: str,
    chunk_size: int | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
) -> str:
    if form != "auto" and form not in FORMS:
        raise InputError(
            f"unknown form {form!r}{nearest(form, FORMS)}; choose auto or one of {', '.join(FORMS)}"
        )
    if chunk_size is not None:
        if form not in ("auto", "chunkwise"):
            raise InputError(
                f"chunk_size belongs to the chunkwise form, not to {form!r}; leave it out"
            )
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
            raise InputError(f"chunk_size must be a whole number ≥ 1, got {chunk_size!r}")
        return "chunkwise"
    if form != "auto":
        return form
    needs_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, state)
    )
    if q.shape[1] == 1 and not needs_grad and backends.has_recurrent_form(backend):
        return "recurrent"
    return "chunkwise"
