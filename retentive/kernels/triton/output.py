"""What the tokens of a chunk read: from the chunk itself, token by token, and from the state.

The output and the gradients of q, k and v are one form. For a token m of a chunk

    out_m = Σ_n γ^|m-n| (a_m · b_n) c_n + γ^e (a_m · S)

           a    b    c    S                     n runs over          e
    o      q    k    v    state before it       n ≤ m                from its start, m + 1
    dq     do   v    k    the same, transposed  n ≤ m                the same
    dk     v    do   q    dstate after it, Tr.  n ≥ m                to its end, C - 1 - m
    dv     k    q    do   the same              n ≥ m                the same

A program takes BLOCK_M tokens m. To the tokens n of other tiles of its chunk the decay is split at
the edge p of its own, γ^|m-n| = γ^|m-p| γ^|p-n|: one factor a row and one a column, none above 1.
Only in its own tile it is a matrix. Each product is formed in the orientation in which it is read
next, so that no accumulator is transposed.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# What Triton's language takes for a constexpr is no constexpr by Python's types.

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from retentive.kernels.triton.cases import OPTIONS, SHARED_MEMORY, Case
from retentive.kernels.triton.configs import (
    SPECIALIZATIONS,
    cdiv,
    describe,
    output_configs,
    pointer,
    tuned,
)
from retentive.kernels.triton.spans import Spans
from retentive.kernels.triton.tiles import decay, load_state, load_tile, log2_decay, span


@triton.jit
def _scores(
    held, a, b, m, n, heads, rows,
    X: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """a_m · b_n for m `[M]` and n `[N]`; `held` is a_m where one block holds all of X."""
    x = tl.arange(0, BLOCK_X)
    if BLOCK_X >= X:
        b_tile = load_tile(b, n[None, :], x[:, None], heads * X, rows, X, BLOCK_X)
        return tl.dot(held, b_tile, input_precision=PRECISION)
    scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for x0 in range(0, X, BLOCK_X):
        a_tile = load_tile(a, m[:, None], x0 + x[None, :], heads * X, rows, X, BLOCK_X)
        b_tile = load_tile(b, n[None, :], x0 + x[:, None], heads * X, rows, X, BLOCK_X)
        scores = tl.dot(a_tile, b_tile, scores, input_precision=PRECISION)
    return scores


@triton.jit(do_not_specialize=["length", "chunk_size", "heads"])
def _read(
    a, b, c, states, out, log_decay, table, length, chunk_size, heads,
    X: tl.constexpr, Y: tl.constexpr, REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """BLOCK_M tokens and BLOCK_Y columns of out; states are `[X,Y]`, TRANSPOSED `[Y,X]`."""
    tiles_y: tl.constexpr = (Y + BLOCK_Y - 1) // BLOCK_Y
    tile = tl.program_id(0) // tiles_y
    row_tiles = tl.cdiv(chunk_size, BLOCK_M)
    chunk = tile // row_tiles
    h = tl.program_id(1)
    start, stop, _ = span(table, chunk, length, chunk_size, True)
    rows = stop - start
    m0 = tile % row_tiles * BLOCK_M
    if m0 >= rows:
        return
    base = start.to(tl.int64) * heads + h
    a += base * X
    b += base * X
    c += base * Y
    out += base * Y
    m = m0 + tl.arange(0, BLOCK_M)
    y = (tl.program_id(0) % tiles_y * BLOCK_Y + tl.arange(0, BLOCK_Y))[None, :]
    rate = log2_decay(log_decay, h)
    if REVERSE:
        edge = tl.minimum(m0 + BLOCK_M, rows) - 1
        to_edge = edge - m
        from_edge = rows - 1 - edge
        first = m0 + BLOCK_M
        last = rows
    else:
        edge = m0
        to_edge = m - edge
        from_edge = edge + 1
        first = 0
        last = m0

    acc = tl.zeros((BLOCK_M, BLOCK_Y), tl.float32)
    s = tl.arange(0, BLOCK_S)
    for s0 in range(0, X, BLOCK_S):
        a_tile = load_tile(a, m[:, None], s0 + s[None, :], heads * X, rows, X, BLOCK_S)
        x = s0 + s[:, None]
        if TRANSPOSED:
            state = load_state(states, chunk, h, heads, Y, X, y, x, BLOCK_Y, BLOCK_S)
        else:
            state = load_state(states, chunk, h, heads, X, Y, x, y, BLOCK_S, BLOCK_Y)
        acc = tl.dot(a_tile, state, acc, input_precision=PRECISION)
    acc *= decay(rate, from_edge)

    held = 0.0
    if BLOCK_X >= X:
        x = tl.arange(0, BLOCK_X)[None, :]
        held = load_tile(a, m[:, None], x, heads * X, rows, X, BLOCK_X)
    for n0 in range(first, last, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        scores = _scores(held, a, b, m, n, heads, rows, X, PRECISION, BLOCK_M, BLOCK_N, BLOCK_X)
        if REVERSE:
            scores *= decay(rate, n - edge)[None, :]
        else:
            scores *= decay(rate, edge - n)[None, :]
        c_tile = load_tile(c, n[:, None], y, heads * Y, rows, Y, BLOCK_Y)
        acc = tl.dot(scores.to(c_tile.dtype), c_tile, acc, input_precision=PRECISION)
    acc *= decay(rate, to_edge)[:, None]

    for own in tl.static_range(0, BLOCK_M, BLOCK_N):
        n = m0 + own + tl.arange(0, BLOCK_N)
        scores = _scores(held, a, b, m, n, heads, rows, X, PRECISION, BLOCK_M, BLOCK_N, BLOCK_X)
        if REVERSE:
            distance = n[None, :] - m[:, None]
        else:
            distance = m[:, None] - n[None, :]
        scores = tl.where(distance >= 0, scores * decay(rate, distance), 0.0)
        c_tile = load_tile(c, n[:, None], y, heads * Y, rows, Y, BLOCK_Y)
        acc = tl.dot(scores.to(c_tile.dtype), c_tile, acc, input_precision=PRECISION)

    mask = (m[:, None] < rows) & (y < Y)
    tl.store(out + m[:, None] * (heads * Y) + y, acc.to(out.dtype.element_ty), mask=mask)


def read_chunks(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    states: Tensor,
    log_decay: Tensor,
    spans: Spans,
    precision: str,
    *,
    reverse: bool = False,
    transposed: bool = False,
) -> Tensor:
    """`out` of the table above, like c.

    Args:
        a, b: contiguous `[B,T,H,X]`.
        c: contiguous `[B,T,H,Y]`.
        states: `[chunks,H,X,Y]`, transposed `[chunks,H,Y,X]`, in the dtype of a, b and c.
        log_decay: float32 `[H]`.
        precision: "ieee" or "tf32", of products of float32.
        reverse: whether tokens read from those after them and from the end of the chunk.
    """
    H, X, Y = a.shape[2], a.shape[3], c.shape[3]
    out = torch.empty_like(c)
    key = X, Y, c.dtype, precision, c.device
    kernel = tuned(_read, output_configs, *key, reverse, transposed)

    def grid(meta) -> tuple[int, int]:
        row_tiles = spans.chunks * cdiv(spans.chunk_size, meta["BLOCK_M"])
        return row_tiles * cdiv(Y, meta["BLOCK_Y"]), H

    with torch.cuda.device_of(a):
        kernel[grid](
            a, b, c, states, out, log_decay, spans.chunk_table,
            spans.length, spans.chunk_size, H,
            X=X, Y=Y, REVERSE=reverse, TRANSPOSED=transposed, PRECISION=precision, **OPTIONS,
        )  # fmt: skip
    return out


def cases(capability: int) -> Iterator[Case]:
    for special in SPECIALIZATIONS:
        K, V, dtype, precision, number = special
        types = {
            **dict.fromkeys(("a", "b", "c", "states", "out"), pointer(dtype)),
            **dict.fromkeys(("length", "chunk_size", "heads"), "i32"),
            "log_decay": "*fp32",
            "table": None,
        }
        for use, X, Y, reverse, transposed in (
            ("o", K, V, False, False),
            ("dq", V, K, False, True),
            ("dk", V, K, True, True),
            ("dv", K, V, True, False),
        ):
            configs = output_configs(X, Y, dtype, precision, SHARED_MEMORY[capability])
            constants = {"X": X, "Y": Y, "REVERSE": reverse, "TRANSPOSED": transposed}
            for n, config in enumerate(configs[:number]):
                yield Case(
                    f"{use} {special} {describe(config)}",
                    _read,
                    {**types, "table": "*i32"} if use == "o" else types,
                    {**constants, "PRECISION": precision, **config.kwargs},
                    config.num_warps,
                    config.num_stages,
                    tensor_cores=dtype != torch.float32,
                    quick=n == 0 and use in ("o", "dk") and str(special).startswith("bf16 K64"),
                )
