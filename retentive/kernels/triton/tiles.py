"""What the retention kernels share: spans of tokens, tiles of a `[T,H,X]` tensor, the decay.

Rows of a batch lie one after the other, so tokens are counted through it and sequence n of a batch
without cu_seqlens is its row n. A chunk is at most `chunk_size` tokens of one sequence.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def span(table, n, length, chunk_size, CHUNK: tl.constexpr):
    """Tokens [start, stop) of chunk n (CHUNK) or of sequence n, and its first chunk.

    `table` int32 `[·,3]` holds them where lengths differ; it is None where all are `length`.
    """
    if table is not None:
        start = tl.load(table + 3 * n)
        stop = tl.load(table + 3 * n + 1)
        chunk = tl.load(table + 3 * n + 2)
    elif CHUNK:
        chunks = tl.cdiv(length, chunk_size)
        row = n // chunks
        start = row * length + (n - row * chunks) * chunk_size
        stop = tl.minimum(start + chunk_size, (row + 1) * length)
        chunk = n
    else:
        start = n * length
        stop = start + length
        chunk = n * tl.cdiv(length, chunk_size)
    return start, stop, chunk


@triton.jit
def load_tile(x, rows, columns, stride, stop, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """x[rows, columns], zero from row `stop` and column WIDTH on; BLOCK columns divide or not.

    Rows may be `[R,1]` and columns `[1,X]`, or the other way round for the transposed tile.
    """
    mask = rows < stop
    if WIDTH % BLOCK != 0:
        mask = mask & (columns < WIDTH)
    return tl.load(x + rows * stride + columns, mask=mask, other=0.0)


@triton.jit
def state_pointers(states, n, h, heads, K: tl.constexpr, V: tl.constexpr, k, v):
    """Of the entries k, v of the state n, h in states `[·,H,K,V]`."""
    return states + (n.to(tl.int64) * heads + h) * (K * V) + k * V + v


@triton.jit
def load_state(states, n, h, heads, K: tl.constexpr, V: tl.constexpr, k, v,
               BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):  # fmt: skip
    """That tile, zero outside: k `[·,1]` and v `[1,·]`, for the transposed the other way round."""
    pointers = state_pointers(states, n, h, heads, K, V, k, v)
    if K % BLOCK_K == 0 and V % BLOCK_V == 0:
        return tl.load(pointers)
    return tl.load(pointers, mask=(k < K) & (v < V), other=0.0)


@triton.jit
def store_state(states, n, h, heads, K: tl.constexpr, V: tl.constexpr, k, v, value):
    pointers = state_pointers(states, n, h, heads, K, V, k, v)
    tl.store(pointers, value.to(states.dtype.element_ty), mask=(k < K) & (v < V))


@triton.jit
def log2_decay(log_decay, h):
    """log₂ γ of head h, in float32: γ itself would round to 1 in the later heads."""
    return tl.load(log_decay + h) * LOG2_E


@triton.jit
def decay(rate, tokens):
    """γ^tokens, for no less than 0 tokens: rows outside of a tile may count fewer."""
    return tl.exp2(rate * tl.maximum(tokens, 0).to(tl.float32))
