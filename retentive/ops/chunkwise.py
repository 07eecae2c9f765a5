"""Chunkwise retention with its own backward, in plain torch: the production path on any device.

Within a chunk of C tokens the parallel form, from chunk to chunk the state (paper §2.3); one chunk
is the parallel form. With S_i the state after chunk i, G_i its gradient, n and m rows of a chunk,
and the powers of γ  D_nm = γ^(n-m) for n ≥ m,  ξ_n = γ^(n+1),  ζ_n = γ^(C-1-n):

    O_i  = (Q Kᵀ ⊙ D) V + (ξ ⊙ Q) S_{i-1}          S_i     = γ^C S_{i-1} + (ζ ⊙ K)ᵀ V
    dQ   = (dO Vᵀ ⊙ D) K + (ξ ⊙ dO) S_{i-1}ᵀ       G_{i-1} = γ^C G_i + Qᵀ (ξ ⊙ dO)
    dK   = (dO Vᵀ ⊙ D)ᵀ Q + (ζ ⊙ V) G_iᵀ
    dV   = (Q Kᵀ ⊙ D)ᵀ dO + (ζ ⊙ K) G_i

Chunks are worked on a segment of n at a time. Tokens are copied heads first, `[n·R·H,C,X]` for R
rows, so that every product is one batched product of small matrices that stay in the cache. For
the backward one state a segment is kept beside the inputs, nothing of size T×C: scores and the
states between are computed again. Products are formed in float32 (float64 for float64 inputs)
whatever the dtype of q, k and v.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from retentive.ops import reference
from retentive.ops.packing import for_each_sequence
from retentive.sequences import empty_state, sequence_bounds, state_dtype

BATCH = 32
"""Matrices in a batched product: enough to outweigh its launch, few enough for the cache."""


def default_chunk_size(q: Tensor, v: Tensor) -> int:
    """The chunk size for q `[B,T,H,K]` and v `[B,T,H,V]`; a short sequence is one chunk.

    A token's work within a chunk is as C(K+V), its share of the chunk's state as KV/C: the best C
    is as √(KV/(K+V)). The factor 8 was measured on CPUs; C is flat around its best.
    """
    length, K, V = q.shape[1], q.shape[3], v.shape[3]
    best = 1 << round(math.log2(8 * math.sqrt(K * V / (K + V))))
    chunk_size = min(max(best, 32), 128)
    return length if length <= 2 * chunk_size else chunk_size


class _Decay(NamedTuple):
    """Powers of γ inside a chunk of C tokens. No exponent is negative, so nothing overflows."""

    within: Tensor  # D    [H, C, C]
    since_start: Tensor  # ξ    [H, C, 1]
    until_end: Tensor  # ζ    [H, C, 1]
    chunk: Tensor  # γ^C  [H, 1, 1]

    @classmethod
    def from_log_decay(cls, log_decay: Tensor, chunk_size: int) -> "_Decay":
        n = torch.arange(chunk_size, dtype=log_decay.dtype, device=log_decay.device)
        rate = log_decay[:, None, None]
        within = torch.exp(rate * (n[:, None] - n[None, :]).clamp(min=0)).tril()
        since_start = torch.exp(rate * (n[:, None] + 1))
        until_end = torch.exp(rate * n.flip(0)[:, None])
        return cls(within, since_start, until_end, torch.exp(rate * chunk_size))

    def for_last(self, rows: int) -> "_Decay":
        """The same for a shorter chunk, `rows` ≤ C; nothing is padded into the state."""
        if rows == self.within.shape[1]:
            return self
        return _Decay(
            self.within[:, :rows, :rows],
            self.since_start[:, :rows],
            self.until_end[:, -rows:],
            self.since_start[:, rows - 1 : rows],
        )


class _Segment(NamedTuple):
    """n chunks of C tokens that are worked on at once."""

    rows: slice  # of the batch
    tokens: slice
    sequences: slice  # rows of the state
    chunk_size: int
    is_first: bool  # of its sequences

    def initial(self, state: Tensor | None, like: Tensor, kept: Iterator[Tensor]) -> Tensor:
        """The state before this segment, `[R·H,K,V]`: kept by the forward, given, or zeros."""
        if not self.is_first:
            return next(kept)[: len(like)]
        return torch.zeros_like(like) if state is None else state[self.sequences].flatten(0, 1)

    def load(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`[B,T,H,X]` -> a copy `[n·R·H,C,X]` of this segment, the operand of a batched product."""
        view = self._heads_first(x)
        return torch.empty(view.shape, dtype=dtype, device=x.device).copy_(view).flatten(0, 2)

    def store(self, x: Tensor, value: Tensor) -> None:
        view = self._heads_first(x)
        view.copy_(value.view(view.shape))

    def _heads_first(self, x: Tensor) -> Tensor:
        chunks = x[self.rows, self.tokens].unflatten(1, (-1, self.chunk_size))
        return chunks.permute(1, 0, 3, 2, 4)  # [n,R,H,C,X]


def _segments(
    cu_seqlens: Tensor | None, batch: int, length: int, heads: int, chunk_size: int
) -> Iterator[_Segment]:
    """Segments in order of time: of some rows after the others, or of sequence after sequence."""
    if cu_seqlens is None:
        at_once = _rows_at_once(batch, length, heads, chunk_size)
        rows = [slice(row, min(row + at_once, batch)) for row in range(0, batch, at_once)]
        runs = [(some, some, 0, length) for some in rows]
    else:
        at_once, bounds = 1, sequence_bounds(cu_seqlens, length)
        runs = [(slice(0, 1), slice(n, n + 1), *ends) for n, ends in enumerate(pairwise(bounds))]
    step = _segment_tokens(at_once * heads, chunk_size)
    for rows, sequences, start, stop in runs:
        rest = (stop - start) % chunk_size  # a last chunk that is shorter, by itself
        for a in range(start, stop - rest, step):
            tokens = slice(a, min(a + step, stop - rest))
            yield _Segment(rows, tokens, sequences, chunk_size, a == start)
        if rest:
            tokens = slice(stop - rest, stop)
            yield _Segment(rows, tokens, sequences, rest, rest == stop - start)


def _rows_at_once(batch: int, length: int, heads: int, chunk_size: int) -> int:
    """As few as fill a batched product with their chunks: the fewer, the fewer states to keep."""
    chunks = min(max(1, length // chunk_size), max(1, BATCH // heads))
    return min(batch, max(1, BATCH // (chunks * heads)))


def _segment_tokens(matrices: int, chunk_size: int) -> int:
    """Tokens of a segment whose chunks have `matrices` = R·H matrices each."""
    return max(1, BATCH // matrices) * chunk_size


def _new_kept(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> Tensor:
    """Room for the state before every segment that is not the first of its sequence.

    Packed sequences need at most so many: one that ends in two short segments is longer than a
    chunk.
    """
    batch, length, heads, _ = q.shape
    if cu_seqlens is None:
        at_once = _rows_at_once(batch, length, heads, chunk_size)
        rest = length % chunk_size
        full = _ceil_div(length - rest, _segment_tokens(at_once * heads, chunk_size))
        kept = _ceil_div(batch, at_once) * (full + _ceil_div(rest, chunk_size) - 1)
    else:
        at_once = 1
        full = length // _segment_tokens(heads, chunk_size)
        kept = full + min(cu_seqlens.shape[0] - 1, length // chunk_size)
    return q.new_empty(kept, at_once * heads, q.shape[3], v.shape[3], dtype=state_dtype(q))


def _ceil_div(n: int, by: int) -> int:
    return -(-n // by)


def _times_(x: Tensor, factor: Tensor) -> Tensor:
    """x `[n·R·H,...]` times a factor of each head `[H,...]`, in place."""
    x.unflatten(0, (-1, len(factor))).mul_(factor)
    return x


def _add_times_(x: Tensor, y: Tensor, factor: Tensor) -> None:
    """x + factor · y, in place."""
    heads = (-1, len(factor))
    x.unflatten(0, heads).addcmul_(y.unflatten(0, heads), factor)


def _scores(q: Tensor, k: Tensor, decay: _Decay) -> Tensor:
    return _times_(torch.bmm(q, k.transpose(1, 2)), decay.within)


def _states(state: Tensor, k_decayed: Tensor, v: Tensor, decay: _Decay) -> Tensor:
    """The state before and after every chunk of a segment, `[n+1,R·H,K,V]`."""
    matrices = len(state)
    states = state.new_empty(1 + len(v) // matrices, *state.shape)
    states[0] = state
    torch.bmm(k_decayed.transpose(1, 2), v, out=states[1:].flatten(0, 1))
    for before, after in pairwise(states):
        _add_times_(after, before, decay.chunk)
    return states


def _state_gradients(dstate: Tensor, q: Tensor, do_decayed: Tensor, decay: _Decay) -> Tensor:
    """The same for the gradient, from the last chunk to the first."""
    matrices = len(dstate)
    gradients = dstate.new_empty(1 + len(q) // matrices, *dstate.shape)
    gradients[-1] = dstate
    torch.bmm(q.transpose(1, 2), do_decayed, out=gradients[:-1].flatten(0, 1))
    for after, before in pairwise(reversed(gradients.unbind())):
        _add_times_(before, after, decay.chunk)
    return gradients


@torch.library.custom_op("retentive::chunkwise", mutates_args=())
def chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """o `[B,T,H,V]` in v's dtype, the final state, and the states that the backward goes on from.

    Arguments as in `retentive.ops.retention`.
    """
    dtype, (batch, length, heads, _) = state_dtype(q), q.shape
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    final = empty_state(q, v, cu_seqlens)
    if state is not None:
        final.copy_(state)
    kept = _new_kept(q, v, cu_seqlens, chunk_size)
    free = iter(kept)
    full = _Decay.from_log_decay(log_decay, chunk_size)
    for segment in _segments(cu_seqlens, batch, length, heads, chunk_size):
        decay = full.for_last(segment.chunk_size)
        running = final[segment.sequences].flatten(0, 1)
        if not segment.is_first:
            next(free)[: len(running)].copy_(running)
        qs, ks, vs = (segment.load(x, dtype) for x in (q, k, v))
        os = torch.bmm(_scores(qs, ks, decay), vs)
        states = _states(running, _times_(ks, decay.until_end), vs, decay)
        os.baddbmm_(_times_(qs, decay.since_start), states[:-1].flatten(0, 1))
        segment.store(o, os)
        running.copy_(states[-1])
    return o, final, kept


@torch.library.custom_op("retentive::chunkwise_backward", mutates_args=())
def chunkwise_backward(
    do: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    kept: Tensor,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the initial state, which is empty where there was none."""
    dtype, (batch, length, heads, _) = state_dtype(q), q.shape
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dstate = dfinal.clone(memory_format=torch.contiguous_format)
    full = _Decay.from_log_decay(log_decay, chunk_size)
    segments = list(_segments(cu_seqlens, batch, length, heads, chunk_size))
    last_kept = sum(not segment.is_first for segment in segments)
    before = iter(reversed(kept[:last_kept].unbind()))
    for segment in reversed(segments):
        decay = full.for_last(segment.chunk_size)
        running = dstate[segment.sequences].flatten(0, 1)
        qs, ks, vs, dos = (segment.load(x, dtype) for x in (q, k, v, do))
        dscores = _scores(dos, vs, decay)
        dqs, dks = torch.bmm(dscores, ks), torch.bmm(dscores.transpose(1, 2), qs)
        dvs = torch.bmm(_scores(qs, ks, decay).transpose(1, 2), dos)
        _times_(ks, decay.until_end)
        states = _states(segment.initial(state, running, before), ks, vs, decay)
        gradients = _state_gradients(running, qs, _times_(dos, decay.since_start), decay)
        after = gradients[1:].flatten(0, 1)
        dqs.baddbmm_(dos, states[:-1].flatten(0, 1).transpose(1, 2))
        dks.baddbmm_(_times_(vs, decay.until_end), after.transpose(1, 2))
        dvs.baddbmm_(ks, after)
        for gradient, value in ((dq, dqs), (dk, dks), (dv, dvs)):
            segment.store(gradient, value)
        running.copy_(gradients[0])
    return dq, dk, dv, dstate if state is not None else dstate.new_empty(0)


@chunkwise.register_fake
def _(q, k, v, log_decay, state, cu_seqlens, chunk_size):
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    return o, empty_state(q, v, cu_seqlens), _new_kept(q, v, cu_seqlens, chunk_size)


@chunkwise_backward.register_fake
def _(do, dfinal, q, k, v, log_decay, state, kept, cu_seqlens, chunk_size):
    contiguous = torch.contiguous_format
    dstate = dfinal.new_empty(0) if state is None else dfinal
    return tuple(torch.empty_like(x, memory_format=contiguous) for x in (q, k, v, dstate))


def _keep(ctx, inputs, output) -> None:
    q, k, v, log_decay, state, cu_seqlens, ctx.chunk_size = inputs
    ctx.save_for_backward(q, k, v, log_decay, state, output[2], cu_seqlens)


def _backward(ctx, do: Tensor, dfinal: Tensor, _):
    if torch.is_grad_enabled():  # create_graph=True
        return _differentiable_backward(ctx, do, dfinal)
    dq, dk, dv, dstate = chunkwise_backward(do, dfinal, *ctx.saved_tensors, ctx.chunk_size)
    return dq, dk, dv, None, dstate if ctx.needs_input_grad[4] else None, None, None


def _differentiable_backward(ctx, do: Tensor, dfinal: Tensor):
    """The same gradients with a graph of their own: by plain operations, slower."""
    q, k, v, log_decay, state, _, cu_seqlens = ctx.saved_tensors
    given = (q, k, v, state)
    wanted = [i for i, at in enumerate((0, 1, 2, 4)) if ctx.needs_input_grad[at]]
    initial = empty_state(q, v, cu_seqlens) if state is None else state
    exact = [x.to(initial.dtype) for x in (q, k, v)]
    o, final = for_each_sequence(
        reference.chunkwise,
        exact[0],
        exact[1],
        exact[2],
        log_decay,
        initial,
        cu_seqlens,
        chunk_size=ctx.chunk_size,
    )
    found = torch.autograd.grad(
        (o.to(v.dtype), final),
        [given[i] for i in wanted],
        (do, dfinal),
        create_graph=True,
        materialize_grads=True,
    )
    dq, dk, dv, dstate = (dict(zip(wanted, found, strict=True)).get(i) for i in range(4))
    return dq, dk, dv, None, dstate, None, None


chunkwise.register_autograd(_backward, setup_context=_keep)
