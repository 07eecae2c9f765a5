"""Chunkwise retention with its own backward, in plain torch: the production path on any device.

Within a chunk of C tokens the parallel form, from chunk to chunk the state (paper §2.3). Heads are
the batch of every matrix product and chunks are walked one after the other, so that a chunk and the
state stay in the cache; the parallel form is the same walk with one chunk. The backward keeps q, k,
v and the initial state, nothing of size T×C: scores are computed again.

With S_i the state after chunk i, G its gradient, n and m rows of a chunk, and the powers of γ
D_nm = γ^(n-m) for n ≥ m, ξ_n = γ^(n+1), ζ_n = γ^(C-1-n):

    O_i  = (Q Kᵀ ⊙ D) V + ξ ⊙ (Q S_{i-1})          S_i     = γ^C S_{i-1} + (ζ ⊙ K)ᵀ V
    dQ   = (dO Vᵀ ⊙ D) K + ξ ⊙ (dO S_{i-1}ᵀ)
    dK   = (dO Vᵀ ⊙ D)ᵀ Q + ζ ⊙ (V Gᵀ)             dS_{i-1} = γ^C G + (ξ ⊙ Q)ᵀ dO
    dV   = (Q Kᵀ ⊙ D)ᵀ dO + ζ ⊙ (K G)

S runs forwards and G backwards, so the backward is two walks: one with S, for the state's part of
dQ, and one with G for all the rest. Products are formed in float32 (float64 for float64 inputs)
whatever the dtype of q, k and v.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from retentive.ops.packing import sequence_bounds


def default_chunk_size(q: Tensor, v: Tensor) -> int:
    """The chunk size for q `[B,T,H,K]` and v `[B,T,H,V]`; a short sequence is one chunk.

    Work inside a chunk grows with C, the cost of launching its operators falls with it. Per token,
    in FLOPs, the first is 2C(K+V) for each of B·H heads, the second about 6e6/C (60 µs at
    100 GFLOP/s): the best C is the root of their ratio.
    """
    batch, length, heads, _ = q.shape
    best = math.sqrt(6e6 / (2 * batch * heads * (q.shape[3] + v.shape[3])))
    chunk_size = min(max(1 << round(math.log2(best)), 64), 256)
    return length if length <= 2 * chunk_size else chunk_size


class _Decay(NamedTuple):
    """Powers of γ inside a chunk of C tokens. No exponent is negative, so nothing overflows."""

    within: Tensor  # D    [H, C, C]
    since_start: Tensor  # ξ    [H, C, 1]
    until_end: Tensor  # ζ    [H, C, 1]
    chunk: Tensor  # γ^C  [H, 1, 1]

    @classmethod
    def of(cls, log_decay: Tensor, chunk_size: int) -> "_Decay":
        n = torch.arange(chunk_size, dtype=log_decay.dtype, device=log_decay.device)
        rate = log_decay[:, None, None]
        within = torch.exp(rate * (n[:, None] - n[None, :]).clamp(min=0)).tril()
        since_start = torch.exp(rate * (n[:, None] + 1))
        until_end = torch.exp(rate * n.flip(0)[:, None])
        return cls(within, since_start, until_end, torch.exp(rate * chunk_size))

    def of_last(self, rows: int) -> "_Decay":
        """The same for a shorter chunk, `rows` ≤ C; nothing is padded into the state."""
        if rows == self.within.shape[1]:
            return self
        return _Decay(
            self.within[:, :rows, :rows],
            self.since_start[:, :rows],
            self.until_end[:, -rows:],
            self.since_start[:, rows - 1 : rows],
        )


def _walks(cu_seqlens: Tensor | None, length: int) -> list[tuple[slice, slice, slice]]:
    """For each independent walk its batch rows, its tokens and its rows of the state."""
    if cu_seqlens is None:
        return [(slice(None), slice(0, length), slice(None))]
    bounds = sequence_bounds(cu_seqlens, length)
    return [
        (slice(0, 1), slice(a, b), slice(n, n + 1)) for n, (a, b) in enumerate(pairwise(bounds))
    ]


def _chunks(x: Tensor, rows: slice, tokens: slice, chunk_size: int) -> tuple[Tensor, ...]:
    """The chunks of one walk, views `[R,H,C,X]` of x `[B,T,H,X]`; none for an empty sequence."""
    if tokens.start == tokens.stop:
        return ()
    return x[rows, tokens].transpose(1, 2).split(chunk_size, dim=2)


def _flat(chunk: Tensor, dtype: torch.dtype) -> Tensor:
    """`[R,H,C,X]` -> `[R*H,C,X]`, the operand of a batched product; a view where R is 1."""
    return chunk.flatten(0, 1).to(dtype)


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """x `[R*H,...]` times a factor of each head `[H,...]`."""
    return (x.unflatten(0, (-1, len(factor))) * factor).flatten(0, 1)


def _times_(x: Tensor, factor: Tensor) -> Tensor:
    x.unflatten(0, (-1, len(factor))).mul_(factor)
    return x


def _scores(q: Tensor, k: Tensor, decay: _Decay) -> Tensor:
    return _times_(torch.bmm(q, k.transpose(1, 2)), decay.within)


def _advance(state: Tensor, k: Tensor, v: Tensor, decay: _Decay) -> None:
    _times_(state, decay.chunk).baddbmm_(_times(k, decay.until_end).transpose(1, 2), v)


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@torch.library.custom_op("retentive::chunkwise", mutates_args=())
def chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """o `[B,T,H,V]` in v's dtype and the final state; arguments as in `retentive.ops.retention`."""
    dtype = _compute_dtype(q)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    final = state.clone(memory_format=torch.contiguous_format)
    full = _Decay.of(log_decay, chunk_size)
    for rows, tokens, sequences in _walks(cu_seqlens, q.shape[1]):
        s = final[sequences].flatten(0, 1)
        for views in zip(
            *(_chunks(x, rows, tokens, chunk_size) for x in (q, k, v, o)), strict=True
        ):
            qc, kc, vc = (_flat(x, dtype) for x in views[:3])
            decay = full.of_last(qc.shape[1])
            oc = torch.bmm(_scores(qc, kc, decay), vc)
            oc.baddbmm_(_times(qc, decay.since_start), s)
            views[3].copy_(oc.view(views[3].shape))
            _advance(s, kc, vc, decay)
    return o, final


@torch.library.custom_op("retentive::chunkwise_backward", mutates_args=())
def chunkwise_backward(
    do: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the initial state."""
    dtype = _compute_dtype(q)
    dq = torch.empty_like(q, dtype=dtype, memory_format=torch.contiguous_format)
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    running = state.clone(memory_format=torch.contiguous_format)
    dstate = dfinal.clone(memory_format=torch.contiguous_format)
    full = _Decay.of(log_decay, chunk_size)
    for rows, tokens, sequences in _walks(cu_seqlens, q.shape[1]):
        pieces = [_chunks(x, rows, tokens, chunk_size) for x in (q, k, v, do, dq, dk, dv)]
        s = running[sequences].flatten(0, 1)
        for _, *inputs, dqc, _, _ in zip(*pieces, strict=True):
            kc, vc, doc = (_flat(x, dtype) for x in inputs)
            decay = full.of_last(kc.shape[1])
            from_state = torch.bmm(doc, s.transpose(1, 2))
            torch.mul(from_state.view(dqc.shape), decay.since_start, out=dqc)
            _advance(s, kc, vc, decay)
        ds = dstate[sequences].flatten(0, 1)
        for *inputs, dqc, dkc, dvc in zip(*map(reversed, pieces), strict=True):
            qc, kc, vc, doc = (_flat(x, dtype) for x in inputs)
            decay = full.of_last(kc.shape[1])
            dscores = _scores(doc, vc, decay)
            dqc.add_(torch.bmm(dscores, kc).view(dqc.shape))
            near, far = torch.bmm(dscores.transpose(1, 2), qc), torch.bmm(vc, ds.transpose(1, 2))
            dkc.copy_(near.view(dkc.shape).addcmul_(far.view(dkc.shape), decay.until_end))
            near = torch.bmm(_scores(qc, kc, decay).transpose(1, 2), doc)
            dvc.copy_(near.baddbmm_(_times(kc, decay.until_end), ds).view(dvc.shape))
            _times_(ds, decay.chunk).baddbmm_(_times(qc, decay.since_start).transpose(1, 2), doc)
    return dq.to(q.dtype), dk, dv, dstate


@chunkwise.register_fake
def _(q, k, v, log_decay, state, cu_seqlens, chunk_size):
    contiguous = torch.contiguous_format
    return torch.empty_like(v, memory_format=contiguous), torch.empty_like(
        state, memory_format=contiguous
    )


@chunkwise_backward.register_fake
def _(do, dfinal, q, k, v, log_decay, state, cu_seqlens, chunk_size):
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, state)
    )


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, do: Tensor, dfinal: Tensor):
    dq, dk, dv, dstate = chunkwise_backward(do, dfinal, *ctx.saved_tensors, ctx.chunk_size)
    return dq, dk, dv, None, dstate, None, None


chunkwise.register_autograd(_backward, setup_context=_keep)
