"""Decoding: new tokens of a batch of slots, from projections to what the output projection takes.

Rotation, decay, update and readout of the state, norm and gate. The state is read and written once
a call, in place, in float32; that traffic is all that counts. Two kernels:

- One token, and enough heads in the batch to fill the GPU: a program takes a whole head, so that
  the norm and the gate are in the same launch.
- Several tokens a slot (speculation, the last chunk of a prompt), or few heads: a program takes a
  slice of a head's values and keeps its part of the state in registers from token to token. No
  program then sees a whole row, so the norm and the gate follow as a launch of their own: programs
  that wait for each other inside one would save about a microsecond, at the price of a protocol.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# A kernel's constexpr parameters take plain values, its others unpacked strides.

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from retentive.kernels.triton.cases import OPTIONS, Case
from retentive.kernels.triton.configs import cdiv, next_power_of_2
from retentive.kernels.triton.norm_gate import activated, affine, launch_norm_gate, standardized

HEAD_TILE = 4096  # elements of the state that a program of a head holds at once,
SLICE_TILE = 8192  # and one of a slice, all of whose state that is
SLICE = 32  # values of a head in a slice: 128 bytes of each row of the state


@triton.jit
def _turned(x, cos, sin, i, K: tl.constexpr):
    """The dims i of a head x `[K]` after its rotation (`retentive.layers.layout.rotate`)."""
    inside = i < K
    partner = tl.where(i < K // 2, i + K // 2, i - K // 2)
    a = tl.load(x + i, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + partner, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + i, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + i, mask=inside, other=0.0).to(tl.float32)
    return a * c + b * s


@triton.jit(do_not_specialize=["heads", "group"])
def _head_kernel(
    q, k, v, gate, state, y, decay, cos, sin, key_cos, key_sin, weight, bias, active,
    heads, group, decay_h, decay_k, q_b, k_b, v_b, gate_b,
    table_b, table_h, key_table_b, key_table_h, eps,
    K: tl.constexpr, V: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One token; a program is a head of a slot: (B·H,)."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // heads, bh % heads
    j = tl.arange(0, BLOCK_V)
    on = True
    if active is not None:
        on = tl.load(active + b) != 0
    if on:
        q += b * q_b + h * K
        k += b * k_b + h // group * K
        v += b * v_b + h // group * V
        table, key_table = b * table_b + h * table_h, b * key_table_b + h * key_table_h
        value = tl.load(v + j, mask=j < V, other=0.0).to(tl.float32)
        o = tl.zeros((BLOCK_V,), tl.float32)
        for first in range(0, K, BLOCK_K):
            i = first + tl.arange(0, BLOCK_K)
            query = _turned(q, cos + table, sin + table, i, K)
            key = _turned(k, key_cos + key_table, key_sin + key_table, i, K)
            at = state + bh * K * V + i[:, None] * V + j[None, :]
            inside = (i < K)[:, None] & (j < V)[None, :]
            gamma = tl.load(decay + h * decay_h + i * decay_k, mask=i < K, other=0.0)
            s = tl.load(at, mask=inside, other=0.0) * gamma[:, None] + key[:, None] * value[None, :]
            tl.store(at, s, mask=inside)
            o += tl.sum(s * query[:, None], 0)
        row, _ = standardized(o[None, :], (j < V)[None, :], eps, V, NORM)
        row = affine(row, weight, bias, j, V)
        if gate is not None:
            g = tl.load(gate + b * gate_b + h * V + j, mask=j < V, other=0.0).to(tl.float32)
            row *= activated(g, ACT)[0][None, :]
        tl.store(y + bh * V + j[None, :], row.to(y.dtype.element_ty), mask=(j < V)[None, :])
    else:
        tl.store(y + bh * V + j, tl.zeros((BLOCK_V,), y.dtype.element_ty), mask=j < V)


@triton.jit(do_not_specialize=["T", "heads", "group"])
def _slice_kernel(
    q, k, v, state, o, decay, cos, sin, key_cos, key_sin, active,
    T, heads, group, decay_h, decay_k, q_b, q_t, k_b, k_t, v_b, v_t,
    table_b, table_t, table_h, key_table_b, key_table_t, key_table_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """T tokens; a program is BLOCK_V values of a head of a slot: (values, B·H).

    In the rows of a slot that is not active o stays as it is.
    """
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    i = tl.arange(0, BLOCK_K)
    j = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (i < K)[:, None] & (j < V)[None, :]
    on = True
    if active is not None:
        on = tl.load(active + b) != 0
    if on:
        q += b * q_b + h * K
        k += b * k_b + h // group * K
        v += b * v_b + h // group * V
        table, key_table = b * table_b + h * table_h, b * key_table_b + h * key_table_h
        at = state + bh * K * V + i[:, None] * V + j[None, :]
        s = tl.load(at, mask=inside, other=0.0)
        gamma = tl.load(decay + h * decay_h + i * decay_k, mask=i < K, other=0.0)[:, None]
        for t in range(T):
            query = _turned(q, cos + table, sin + table, i, K)
            key = _turned(k, key_cos + key_table, key_sin + key_table, i, K)
            value = tl.load(v + j, mask=j < V, other=0.0).to(tl.float32)
            s = s * gamma + key[:, None] * value[None, :]
            row = ((b * T + t) * heads + h) * V
            tl.store(o + row + j, tl.sum(s * query[:, None], 0), mask=j < V)
            q += q_t
            k += k_t
            v += v_t
            table += table_t
            key_table += key_table_t
        tl.store(at, s, mask=inside)


@torch.library.custom_op("retentive::decode_step", mutates_args=("state",))
def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    state: Tensor,
    decay: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cos: Tensor,
    key_sin: Tensor,
    active: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    act: str,
    eps: float,
) -> Tensor:
    """T new tokens of each slot: y `[B,T,H·V]` in v's dtype, the state moved on in place.

    q `[B,T,H,K]`, k `[B,T,J,K]` and v `[B,T,J,V]` as projected; H/J consecutive heads share a key
    head. gate `[B,T,H·V]`. state float32 `[B,H,K,V]`, contiguous; decay float32 `[H,1|K]`, what a
    token shrinks it by. Tables of the slots' own positions `[B|1,T,1|H,K]`, as in `rotate_qk`.
    norm, act, weight, bias and eps as in `norm_gate`.
    active: bool `[B]`; a slot that is not active keeps its state, and its y is zero.
    """
    q, k, v = (_dense_heads(x) for x in (q, k, v))
    batch, length, heads, _ = q.shape
    assert state.is_contiguous() and state.dtype == decay.dtype == torch.float32
    decay = decay.expand(q.shape[2:])
    tables = [table.expand(q.shape) for table in (cos, sin, key_cos, key_sin)]
    y = _output(q, v)
    with torch.cuda.device_of(q):
        if length == 1 and batch * heads >= multiprocessors(q.device):
            ends = (gate, weight, bias, norm, act, eps, y)
            _whole_heads(q, k, v, state, decay, tables, active, *ends)
        else:
            o = state.new_empty(*q.shape[:3], v.shape[3])
            _slices(q, k, v, state, decay, tables, active, o)
            launch_norm_gate(o, gate, weight, bias, norm, act, eps, y, active)
    return y


def _whole_heads(
    q, k, v, state, decay, tables, active, gate, weight, bias, norm, act, eps, y
) -> None:  # fmt: skip
    batch, _, heads, K = q.shape
    V = v.shape[3]
    gate = None if gate is None else gate if gate.stride(2) == 1 else gate.contiguous()
    cos, _, key_cos, _ = tables
    _head_kernel[(batch * heads,)](
        q, k, v, gate, state, y, decay, *tables, weight, bias, active,
        heads, heads // k.shape[2], *decay.stride(),
        q.stride(0), k.stride(0), v.stride(0), 0 if gate is None else gate.stride(0),
        cos.stride(0), cos.stride(2), key_cos.stride(0), key_cos.stride(2), eps,
        NORM=norm, ACT=act, **_head_tile(K, V), **OPTIONS,
    )  # fmt: skip


def _slices(q, k, v, state, decay, tables, active, o) -> None:
    batch, length, heads, K = q.shape
    V = v.shape[3]
    cos, _, key_cos, _ = tables
    tile = _slice_tile(K, V)
    _slice_kernel[(cdiv(V, tile["BLOCK_V"]), batch * heads)](
        q, k, v, state, o, decay, *tables, active,
        length, heads, heads // k.shape[2], *decay.stride(),
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        *cos.stride()[:3], *key_cos.stride()[:3], **tile, **OPTIONS,
    )  # fmt: skip


def _head_tile(K: int, V: int) -> dict[str, int]:
    """The constants of `_head_kernel`: a tile of the state is BLOCK_K whole rows."""
    width, depth = next_power_of_2(V), next_power_of_2(K)
    block_k = min(depth, max(1, HEAD_TILE // width))
    return {"K": K, "V": V, "BLOCK_K": block_k, "BLOCK_V": width}


def _slice_tile(K: int, V: int) -> dict[str, int]:
    """The constants of `_slice_kernel`: a tile of the state is all K rows of a slice."""
    depth = next_power_of_2(K)
    width = min(next_power_of_2(V), SLICE, max(1, SLICE_TILE // depth))
    return {"K": K, "V": V, "BLOCK_K": depth, "BLOCK_V": width}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Programs that run side by side; 1 in the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _dense_heads(x: Tensor) -> Tensor:
    """x `[B,T,H,X]` with the heads of a token side by side, a view where it can be."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def _output(q: Tensor, v: Tensor) -> Tensor:
    return v.new_empty(*q.shape[:2], q.shape[2] * v.shape[3])


@decode_step.register_fake
def _(
    q, k, v, gate, state, decay, cos, sin, key_cos, key_sin, active, weight, bias, norm, act, eps
):  # fmt: skip
    return _output(q, v)


def cases(capability: int) -> Iterator[Case]:
    types = dict.fromkeys(("q", "k", "v", "gate", "y"), "*bf16")
    types |= dict.fromkeys(("state", "o", "cos", "sin", "key_cos", "key_sin"), "*fp32")
    types |= {"decay": "*fp32", "active": "*i1", "weight": None, "bias": None, "eps": "fp32"}
    for K, V in ((16, 16), (64, 128), (128, 256), (256, 512)):
        for kernel, tile in ((_head_kernel, _head_tile), (_slice_kernel, _slice_tile)):
            numbers = {
                p.name: "i32" for p in kernel.params if p.name not in types and not p.is_constexpr
            }
            yield Case(
                f"decode{kernel.__name__}[K{K} V{V}]",
                kernel,
                {**types, **numbers},
                {"NORM": "layernorm", "ACT": "swish", **tile(K, V)},
                quick=V == 512,
            )
