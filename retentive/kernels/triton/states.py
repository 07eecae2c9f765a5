"""The state from chunk to chunk, and its gradient from the last chunk to the first.

Both are one recurrence over tokens, S = γ S + xᵀ y a token, with powers of γ for a tile of R:

    S_i     = γ^R S_{i-1} + (ζ ⊙ K)ᵀ V     ζ_r = γ^(R-1-r)     x = k, y = v
    G_{i-1} = γ^R G_i     + (ξ ⊙ Q)ᵀ dO    ξ_r = γ^(r+1)       x = q, y = do, from the last

It is carried in float32. What it is before each chunk (for G: after it) is stored in the dtype of x
and y, which is the operand of the products that read it (`output`): bfloat16 halves the traffic.

`_carry` goes through a sequence from end to end. Where sequences, heads and tiles of the state are
too few to fill the GPU, it goes through every chunk as if it were a sequence, all at once, and
`_scan` then carries what they gave from chunk to chunk: elementwise, with one scalar γ^C.
"""

# pyright: reportArgumentType=false
# What Triton's language takes for a constexpr is no constexpr by Python's types.

from collections.abc import Iterator
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from retentive.kernels.triton.cases import OPTIONS, SHARED_MEMORY, Case
from retentive.kernels.triton.configs import (
    SPECIALIZATIONS,
    cdiv,
    describe,
    pointer,
    state_configs,
    tuned,
)
from retentive.kernels.triton.spans import Spans
from retentive.kernels.triton.tiles import (
    decay,
    load_state,
    load_tile,
    log2_decay,
    span,
    store_state,
)

SCAN_BLOCK = 1024  # elements of the state that a program of `_scan` carries


@triton.jit(do_not_specialize=["length", "chunk_size", "heads"])
def _carry(
    x, y, log_decay, initial, states, final, table, length, chunk_size, heads,
    K: tl.constexpr, V: tl.constexpr, CHUNKS: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """A tile of the state of one sequence and head (CHUNKS: of one chunk and head).

    initial None is zeros; states None are not stored. chunk_size is a multiple of BLOCK_T.
    """
    tiles_v: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    tiles: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K * tiles_v
    n = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    h = tl.program_id(1)
    k = (tile // tiles_v * BLOCK_K + tl.arange(0, BLOCK_K))[:, None]
    v = (tile % tiles_v * BLOCK_V + tl.arange(0, BLOCK_V))[None, :]
    rate = log2_decay(log_decay, h)
    start, stop, first_chunk = span(table, n, length, chunk_size, CHUNKS)
    r = tl.arange(0, BLOCK_T)

    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if initial is not None:
        state += load_state(initial, n, h, heads, K, V, k, v, BLOCK_K, BLOCK_V)
    token_tiles = tl.cdiv(stop - start, BLOCK_T)
    for i in range(0, token_tiles):
        if REVERSE:
            t = (token_tiles - 1 - i) * BLOCK_T
        else:
            t = i * BLOCK_T
        if states is not None:
            if REVERSE:
                enters = ((t + BLOCK_T) % chunk_size == 0) | (i == 0)
            else:
                enters = t % chunk_size == 0
            if enters:
                store_state(states, first_chunk + t // chunk_size, h, heads, K, V, k, v, state)
        rows = tl.minimum(stop - start - t, BLOCK_T)
        base = (start + t).to(tl.int64) * heads + h
        xs = load_tile(x + base * K, r[None, :], k, heads * K, rows, K, BLOCK_K)
        ys = load_tile(y + base * V, r[:, None], v, heads * V, rows, V, BLOCK_V)
        if REVERSE:
            weight = decay(rate, r + 1)
        else:
            weight = decay(rate, rows - 1 - r)
        state *= decay(rate, rows)
        xs = (xs * weight[None, :]).to(ys.dtype)
        state = tl.dot(xs, ys, state, input_precision=PRECISION)
    store_state(final, n, h, heads, K, V, k, v, state)


@triton.jit(do_not_specialize=["length", "chunk_size", "heads"])
def _scan(
    local, log_decay, initial, states, final, table, length, chunk_size, heads,
    SIZE: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of the states of one sequence and head, from what each chunk gave alone."""
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    n = tl.program_id(0) // blocks
    h = tl.program_id(1)
    e = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
    rate = log2_decay(log_decay, h)
    start, stop, first_chunk = span(table, n, length, chunk_size, False)

    row = tl.zeros((1, 1), tl.int32)  # a state as one long row

    state = tl.zeros((1, BLOCK), tl.float32)
    if initial is not None:
        state += load_state(initial, n, h, heads, 1, SIZE, row, e, 1, BLOCK)
    chunks = tl.cdiv(stop - start, chunk_size)
    for i in range(0, chunks):
        if REVERSE:
            c = chunks - 1 - i
        else:
            c = i
        chunk = first_chunk + c
        store_state(states, chunk, h, heads, 1, SIZE, row, e, state)
        tokens = tl.minimum(stop - start - c * chunk_size, chunk_size)
        state *= decay(rate, tokens)
        state += load_state(local, chunk, h, heads, 1, SIZE, row, e, 1, BLOCK)
    store_state(final, n, h, heads, 1, SIZE, row, e, state)


def chunk_states(
    x: Tensor,
    y: Tensor,
    log_decay: Tensor,
    initial: Tensor | None,
    spans: Spans,
    precision: str,
    *,
    reverse: bool = False,
    split: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The state before every chunk and the last one; in reverse its gradient after every chunk.

    Args:
        x, y: contiguous `[B,T,H,K]` and `[B,T,H,V]`: k and v, or in reverse q and do.
        log_decay: float32 `[H]`.
        initial: float32 `[N,H,K,V]`, in reverse the gradient of the final state. None is zeros.
        precision: "ieee" or "tf32", of products of float32.
        split: whether chunks are worked all at once; by default where that fills the GPU better.

    Returns:
        `[chunks,H,K,V]` in the dtype of x and float32 `[N,H,K,V]`.
    """
    H, K, V = x.shape[2], x.shape[3], y.shape[3]
    states = x.new_empty(spans.chunks, H, K, V)
    final = x.new_empty(spans.sequences, H, K, V, dtype=torch.float32)
    if split is None:
        split = spans.chunks > spans.sequences and _leaves_idle(spans.sequences * H, K, V, x.device)
    shared = (spans.length, spans.chunk_size, H)

    def carry(n: int, initial, states, final, table, chunks: bool) -> None:
        kernel = tuned(_carry, state_configs, K, V, x.dtype, precision, x.device, chunks, reverse)
        kernel[lambda meta: (n * _tiles(K, V, meta["BLOCK_K"], meta["BLOCK_V"]), H)](
            x, y, log_decay, initial, states, final, table, *shared,
            K=K, V=V, CHUNKS=chunks, REVERSE=reverse, PRECISION=precision, **OPTIONS,
        )  # fmt: skip

    with torch.cuda.device_of(x):
        if not split:
            carry(spans.sequences, initial, states, final, spans.sequence_table, False)
            return states, final
        local = torch.empty_like(states, dtype=torch.float32)
        carry(spans.chunks, None, None, local, spans.chunk_table, True)
        _scan[spans.sequences * cdiv(K * V, SCAN_BLOCK), H](
            local, log_decay, initial, states, final, spans.sequence_table, *shared,
            SIZE=K * V, REVERSE=reverse, BLOCK=SCAN_BLOCK, **OPTIONS,
        )  # fmt: skip
    return states, final


def _tiles(K: int, V: int, block_k: int, block_v: int) -> int:
    return cdiv(K, block_k) * cdiv(V, block_v)


def _leaves_idle(programs: int, K: int, V: int, device: torch.device) -> bool:
    """Whether one program a sequence, head and tile of 64 × 128 leaves multiprocessors idle."""
    return programs * _tiles(K, V, 64, 128) < _multiprocessors(device)


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def cases(capability: int) -> Iterator[Case]:
    for special in SPECIALIZATIONS:
        K, V, dtype, precision, number = special
        types = {
            **dict.fromkeys(("x", "y", "states"), pointer(dtype)),
            **dict.fromkeys(("log_decay", "initial", "final"), "*fp32"),
            **dict.fromkeys(("length", "chunk_size", "heads"), "i32"),
            "table": None,
        }
        whole, apart = types, {**types, "initial": None, "states": None}
        configs = state_configs(K, V, dtype, precision, SHARED_MEMORY[capability])
        for n, config in enumerate(configs[:number]):
            blocks = config.kwargs
            for use, kinds, chunks, reverse in (
                ("states", {**whole, "table": "*i32"}, False, False),
                ("dstates", whole, False, True),
                ("states, a chunk", apart, True, False),
            ):
                constants = {"K": K, "V": V, "CHUNKS": chunks, "REVERSE": reverse}
                yield Case(
                    f"{use} {special} {describe(config)}",
                    _carry,
                    kinds,
                    {**constants, "PRECISION": precision, **blocks},
                    config.num_warps,
                    config.num_stages,
                    tensor_cores=dtype != torch.float32 and blocks["BLOCK_K"] >= 64,
                    quick=n == 0 and use == "dstates" and str(special).startswith("bf16 K64"),
                )
    types = {
        **dict.fromkeys(("local", "log_decay", "initial", "final"), "*fp32"),
        **dict.fromkeys(("length", "chunk_size", "heads"), "i32"),
        "states": "*bf16",
        "table": "*i32",
    }
    constants = {"SIZE": 64 * 128, "REVERSE": False, "BLOCK": SCAN_BLOCK}
    yield Case("scan bf16 K64 V128", _scan, types, constants, quick=True)
