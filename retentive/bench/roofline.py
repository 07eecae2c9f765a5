"""The least time that retention can take on a machine, by its rates of products and of memory.

Per token of one layer with H heads of K and V dims, C the chunk, b the sub-tile of 64 within it:

             products, FLOPs                      numbers read and written
    forward  H ((C + b)(K + V) + 4KV)             H (3K + 3V + 2KV/C)
    backward H ((C + b)(3K + 2V) + 10KV)          H (6K + 5V + 4KV/C)

Those are two passes over chunks with stored states, recomputed in the backward, at the C that is
best on the machine: the limit of our kernels' design ("design"). No kernel can do with less than
each tensor once, forward 2K + 2V and backward 4K + 3V, and products at C = b ("floor"). Forward and
backward follow each other, so their times add up; within one of them products and memory overlap at
best.
"""

from dataclasses import dataclass

SUB_TILE = 64
CHUNKS = range(64, 1025, 64)


@dataclass(frozen=True)
class Op:
    """Retention over `tokens` tokens, of all sequences together; a number takes `size` bytes."""

    tokens: int
    heads: int
    K: int
    V: int
    size: int


def roofline(op: Op, gemm: float, stream: float) -> dict[str, float]:
    """Seconds of forward and backward together, by each of the two counts."""
    at_best = min(_design(op, C, gemm, stream) for C in CHUNKS)
    return {"design": at_best, "floor": _floor(op, gemm, stream)}


def _design(op: Op, C: int, gemm: float, stream: float) -> float:
    K, V, states = op.K, op.V, op.K * op.V / C
    forward, backward = _flops(op, C)
    numbers = (3 * K + 3 * V + 2 * states, 6 * K + 5 * V + 4 * states)
    return _seconds(op, (forward, backward), numbers, gemm, stream)


def _floor(op: Op, gemm: float, stream: float) -> float:
    numbers = (2 * op.K + 2 * op.V, 4 * op.K + 3 * op.V)
    return _seconds(op, _flops(op, SUB_TILE), numbers, gemm, stream)


def _flops(op: Op, C: int) -> tuple[float, float]:
    """Of a token and head, forward and backward."""
    K, V, seen = op.K, op.V, C + SUB_TILE
    return seen * (K + V) + 4 * K * V, seen * (3 * K + 2 * V) + 10 * K * V


def _seconds(
    op: Op,
    flops: tuple[float, float],
    numbers: tuple[float, float],
    gemm: float,
    stream: float,
) -> float:
    passes = zip(flops, numbers, strict=True)
    slowest = sum(max(f / gemm, op.size * n / stream) for f, n in passes)
    return op.tokens * op.heads * slowest
