"""Chunkwise retention on a GPU, with its own backward: `states` and `output` put together.

    forward     S of every chunk from k and v;  o from q, k, v and S
    backward    S again;  dq from it;  G, the gradient of S, in its place;  dk and dv from G

The backward keeps q, k and v: states cost T/C · K·V numbers a head, as much as v at C = 256, and to
compute them again costs 2 of its 10 products with a state. Nothing of size T × C is ever in memory.
Every sum has one order: no atomics, results are the same in every run.

Products of float32 follow `torch.backends.cuda.matmul`, as those of torch itself: exact ("ieee")
unless tf32 is allowed there. That, like the tile sizes, is looked up in every call, also in the
backward's.
"""

import torch
from torch import Tensor

from retentive.kernels.triton.output import read_chunks
from retentive.kernels.triton.spans import Spans
from retentive.kernels.triton.states import chunk_states
from retentive.sequences import empty_state
from retentive.transforms import differentiable_once


def default_chunk_size(v: Tensor) -> int:
    """C for v `[B,T,H,V]`.

    A token costs C(K+V) within its chunk and KV/C for its state: by rooflines of an H100 the best
    C is 142-201 at V = 128, 284-401 at V = 512, and the cost is flat around it.
    """
    return 128 if v.shape[-1] <= 128 else 256


def matmul_precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@torch.library.custom_op("retentive::triton_chunkwise", mutates_args=())
def chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """o `[B,T,H,V]` in v's dtype and the final state; arguments as in `retentive.ops.retention`."""
    q, k, v = (x.contiguous() for x in (q, k, v))
    spans, precision = Spans.of(q, cu_seqlens, chunk_size), matmul_precision()
    states, final = chunk_states(k, v, log_decay, _contiguous(state), spans, precision)
    return read_chunks(q, k, v, states, log_decay, spans, precision), final


@torch.library.custom_op("retentive::triton_chunkwise_backward", mutates_args=())
def chunkwise_backward(
    do: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the initial state, which is empty where there was none."""
    do, dfinal, q, k, v = (x.contiguous() for x in (do, dfinal, q, k, v))
    spans, precision = Spans.of(q, cu_seqlens, chunk_size), matmul_precision()
    shared = (log_decay, spans, precision)
    states, _ = chunk_states(k, v, log_decay, _contiguous(state), spans, precision)
    dq = read_chunks(do, v, k, states, *shared, transposed=True)
    del states  # its memory is that of the next ones
    dstates, dstate = chunk_states(q, do, log_decay, dfinal, spans, precision, reverse=True)
    dk = read_chunks(v, do, q, dstates, *shared, reverse=True, transposed=True)
    dv = read_chunks(k, q, do, dstates, *shared, reverse=True)
    return dq, dk, dv, dstate if state is not None else dstate.new_empty(0)


def _contiguous(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.contiguous()


@chunkwise.register_fake
def _(q, k, v, log_decay, state, cu_seqlens, chunk_size):
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    return o, empty_state(q, v, cu_seqlens)


@chunkwise_backward.register_fake
def _(do, dfinal, q, k, v, log_decay, state, cu_seqlens, chunk_size):
    contiguous = torch.contiguous_format
    dstate = dfinal.new_empty(0) if state is None else dfinal
    return tuple(torch.empty_like(x, memory_format=contiguous) for x in (q, k, v, dstate))


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors)


@differentiable_once
def _backward(ctx, do: Tensor, dfinal: Tensor):
    dq, dk, dv, dstate = chunkwise_backward(do, dfinal, *ctx.saved_tensors, ctx.chunk_size)
    return dq, dk, dv, None, dstate if ctx.needs_input_grad[4] else None, None, None


chunkwise.register_autograd(_backward, setup_context=_keep)
