"""Queries and keys turned by their positions in one pass, and its backward.

The angles come as tables that the model makes once a forward, in float64 from integer positions,
then cast (`retentive.layers.layout`): right at any position, and whatever the rule of frequencies
and the factors that ride on it (row scale on queries, key scale on keys). A kernel that formed
angles by itself would have to know each rule and save little: a token's tables are shared by all
heads and layers, and are read from the L2 cache. Of the tables one half is read, the other is the
same but for a sign.
"""

# pyright: reportArgumentType=false
# A kernel's constexpr parameters take plain values, its others unpacked strides.

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from retentive.kernels.triton.cases import OPTIONS, Case
from retentive.kernels.triton.configs import cdiv, next_power_of_2

TILE = 4096  # elements of a head that a program turns


@triton.jit
def _turn(
    x, x_token, y, y_token, cos, sin, table_token, inside,
    pairs: tl.constexpr, TRANSPOSE: tl.constexpr,
):  # fmt: skip
    """(a, b) -> (a cos - b sin, b cos + a sin) for offsets of the first halves of a head."""
    c = tl.load(cos + table_token, mask=inside, other=0.0)
    s = tl.load(sin + table_token + pairs, mask=inside, other=0.0)
    if TRANSPOSE:
        s = -s
    a = tl.load(x + x_token, mask=inside, other=0.0).to(c.dtype)
    b = tl.load(x + x_token + pairs, mask=inside, other=0.0).to(c.dtype)
    tl.store(y + y_token, (a * c - b * s).to(y.dtype.element_ty), mask=inside)
    tl.store(y + y_token + pairs, (b * c + a * s).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "heads", "key_heads"])
def _rotation_kernel(
    q, k, turned_q, turned_k, cos, sin, key_cos, key_sin,
    T, heads, key_heads,
    q_b, q_t, q_h, k_b, k_t, k_h, table_b, table_t, table_h, key_table_b, key_table_t, key_table_h,
    PAIRS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, TRANSPOSE: tl.constexpr,
):  # fmt: skip
    """A program is BLOCK_T tokens of a head of the queries or of the keys: (tokens x heads, B)."""
    head = tl.program_id(0) % (heads + key_heads)
    block = tl.program_id(0) // (heads + key_heads)
    b = tl.program_id(1).to(tl.int64)
    t = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    p = tl.arange(0, BLOCK_P)[None, :]
    inside = (t < T) & (p < PAIRS)
    if head < heads:
        _turn(
            q, b * q_b + t * q_t + head * q_h + p,
            turned_q, ((b * T + t) * heads + head) * 2 * PAIRS + p,
            cos, sin, b * table_b + t * table_t + head * table_h + p,
            inside, PAIRS, TRANSPOSE,
        )  # fmt: skip
    else:
        head -= heads
        _turn(
            k, b * k_b + t * k_t + head * k_h + p,
            turned_k, ((b * T + t) * key_heads + head) * 2 * PAIRS + p,
            key_cos, key_sin, b * key_table_b + t * key_table_t + head * key_table_h + p,
            inside, PAIRS, TRANSPOSE,
        )  # fmt: skip


@torch.library.custom_op("retentive::rotate_qk", mutates_args=())
def rotate_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cos: Tensor,
    key_sin: Tensor,
    transpose: bool = False,
) -> tuple[Tensor, Tensor]:
    """`retentive.layers.layout.rotate` of q `[B,T,H,K]` and of k, whose heads may be fewer.

    cos, sin, key_cos, key_sin: `[B|1,T,1|H,K]`, of `retentive.layers.layout.Angles`; computed in
        their dtype, returned in that of q. The halves of a cosine row are equal, those of a sine
        row opposite.
    transpose: the transposed rotation, which is the backward of the rotation.
    """
    batch, length, heads, dim = q.shape
    q, k, cos, sin, key_cos, key_sin = map(_dense_rows, (q, k, cos, sin, key_cos, key_sin))
    cos, sin = (table.expand(q.shape) for table in (cos, sin))
    key_cos, key_sin = (table.expand(k.shape) for table in (key_cos, key_sin))
    assert cos.stride() == sin.stride() and key_cos.stride() == key_sin.stride()
    turned_q, turned_k = _like(q), _like(k)
    tile = _tile(dim)
    programs = cdiv(length, tile["BLOCK_T"]) * (heads + k.shape[2])
    with torch.cuda.device_of(q):
        _rotation_kernel[(programs, batch)](
            q, k, turned_q, turned_k, cos, sin, key_cos, key_sin,
            length, heads, k.shape[2],
            *q.stride()[:3], *k.stride()[:3], *cos.stride()[:3], *key_cos.stride()[:3],
            TRANSPOSE=transpose, **tile, **OPTIONS,
        )  # fmt: skip
    return turned_q, turned_k


def _tile(dim: int) -> dict[str, int]:
    """The constants of the kernel for heads of K = `dim`."""
    width = next_power_of_2(dim // 2)
    return {"PAIRS": dim // 2, "BLOCK_T": max(1, TILE // (2 * width)), "BLOCK_P": width}


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@rotate_qk.register_fake
def _(q, k, cos, sin, key_cos, key_sin, transpose=False):
    return _like(q), _like(k)


def _keep(ctx, inputs, output) -> None:
    *_, cos, sin, key_cos, key_sin, ctx.transpose = inputs
    ctx.save_for_backward(cos, sin, key_cos, key_sin)


def _backward(ctx, dq: Tensor, dk: Tensor):
    return *rotate_qk(dq, dk, *ctx.saved_tensors, not ctx.transpose), None, None, None, None, None


rotate_qk.register_autograd(_backward, setup_context=_keep)


def cases(capability: int) -> Iterator[Case]:
    pointers = dict.fromkeys(("q", "k", "turned_q", "turned_k"), "*bf16")
    tables = dict.fromkeys(("cos", "sin", "key_cos", "key_sin"), "*fp32")
    for K in (16, 64, 128, 256):
        numbers = {
            p.name: "i32"
            for p in _rotation_kernel.params
            if p.name not in pointers | tables and not p.is_constexpr
        }
        yield Case(
            f"rotation[K{K}]",
            _rotation_kernel,
            {**pointers, **tables, **numbers},
            {"TRANSPOSE": False, **_tile(K)},
            quick=K == 256,
        )
