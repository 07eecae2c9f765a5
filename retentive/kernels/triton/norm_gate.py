"""The norm of each head and the gate over what retention gives, in one pass, and its backward.

A row is one head of one token, o `[V]`, whole in a program: with x̂ = (o - μ)/σ (μ = 0 for RMS,
σ² the mean square and eps), n = w x̂ + b and y = n · act(g):

    dn = dy · act(g)    dx̂ = w dn    dg = dy · n · act'(g)
    do = (dx̂ - x̂ mean(x̂ dx̂) - [layernorm] mean(dx̂)) / σ
    dw = Σ x̂ dn         db = Σ dn    over all rows

All of it in float32. The backward keeps the inputs alone; the sums over rows are of a fixed number
of rows each, then added up by torch, so that they are the same in every run.
"""

# pyright: reportArgumentType=false
# A kernel's constexpr parameters take plain values, its others unpacked strides.

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from retentive.kernels.triton.cases import OPTIONS, Case
from retentive.kernels.triton.configs import cdiv, next_power_of_2

NORMS = ("layernorm", "rmsnorm", "none")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "swish")
TILE = 2048  # elements of a program of the forward
BACKWARD_TILE, TILES = 1024, 32  # and of the backward, which takes so many, one after the other


@triton.jit
def standardized(x, inside, eps, V: tl.constexpr, NORM: tl.constexpr):
    """x̂ of the rows of x `[R,V]`, zero outside, and 1/σ `[R,1]`."""
    if NORM == "none":
        return x, tl.full((x.shape[0], 1), 1.0, tl.float32)
    if NORM == "layernorm":
        x = tl.where(inside, x - tl.sum(x, 1, keep_dims=True) / V, 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / V + eps)
    return x * rstd, rstd


@triton.jit
def affine(x, weight, bias, v, V: tl.constexpr):
    """w x + b for the columns v of x `[R,V]`; either may be None."""
    if weight is not None:
        x = x * tl.load(weight + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        x = x + tl.load(bias + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def activated(g, ACT: tl.constexpr):
    """act(g) and act'(g)."""
    if ACT == "gelu":
        below = 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)  # Φ(g), of the normal distribution
        return g * below, below + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    if ACT == "gelu_tanh":  # (1 + tanh u) / 2 = sigmoid(2u)
        s = tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
        return g * s, s + g * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * g * g)
    if ACT == "quick_gelu":
        s = tl.sigmoid(1.702 * g)
        return g * s, s + g * s * (1.0 - s) * 1.702
    if ACT == "relu":
        return tl.where(g < 0.0, 0.0, g), tl.where(g > 0.0, 1.0, 0.0)  # NaN stays NaN
    if ACT == "relu2":
        r = tl.where(g < 0.0, 0.0, g)
        return r * r, 2.0 * r
    s = tl.sigmoid(g)
    return g * s, s * (1.0 + g * (1.0 - s))


@triton.jit(do_not_specialize=["rows", "heads", "rows_a_slot"])
def _forward_kernel(
    o, gate, weight, bias, active, y,
    rows, heads, rows_a_slot, gate_token, eps,
    V: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """y of BLOCK_R rows; zero in the rows of a slot that is not active."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    v = tl.arange(0, BLOCK_V)
    inside = (row < rows)[:, None] & (v < V)[None, :]
    at = row[:, None] * V + v[None, :]
    x = tl.load(o + at, mask=inside, other=0.0).to(tl.float32)
    x, _ = standardized(x, inside, eps, V, NORM)  # pyright: ignore[reportGeneralTypeIssues]
    x = affine(x, weight, bias, v, V)
    if gate is not None:
        at_gate = (row // heads * gate_token + row % heads * V)[:, None] + v[None, :]
        g = tl.load(gate + at_gate, mask=inside, other=0.0).to(tl.float32)
        x *= activated(g, ACT)[0]
    if active is not None:
        on = tl.load(active + row // rows_a_slot, mask=row < rows, other=0)
        x = tl.where(on[:, None] != 0, x, 0.0)
    tl.store(y + at, x.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "heads"])
def _backward_kernel(
    dy, o, gate, weight, bias, do, dgate, dweight, dbias,
    rows, heads, gate_token, eps,
    V: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """do and dgate of TILES tiles of rows, and the sums of these rows for dw and db."""
    v = tl.arange(0, BLOCK_V)
    w_sum = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    b_sum = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    for tile in range(TILES):
        first = (tl.program_id(0).to(tl.int64) * TILES + tile) * BLOCK_R
        row = first + tl.arange(0, BLOCK_R)
        inside = (row < rows)[:, None] & (v < V)[None, :]
        at = row[:, None] * V + v[None, :]
        x = tl.load(o + at, mask=inside, other=0.0).to(tl.float32)
        dn = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        x, rstd = standardized(x, inside, eps, V, NORM)
        if gate is not None:
            at_gate = (row // heads * gate_token + row % heads * V)[:, None] + v[None, :]
            g = tl.load(gate + at_gate, mask=inside, other=0.0).to(tl.float32)
            value, slope = activated(g, ACT)
            dg = dn * affine(x, weight, bias, v, V) * slope
            tl.store(dgate + at, dg.to(dgate.dtype.element_ty), mask=inside)
            dn *= value
        dx = affine(dn, weight, None, v, V)
        w_sum += dn * x
        b_sum += dn
        if NORM == "layernorm":
            dx -= tl.sum(dx, 1, keep_dims=True) / V
        if NORM != "none":
            dx = (dx - x * (tl.sum(dx * x, 1, keep_dims=True) / V)) * rstd
        tl.store(do + at, dx.to(do.dtype.element_ty), mask=inside)
    part = tl.program_id(0).to(tl.int64) * V + v
    if weight is not None:
        tl.store(dweight + part, tl.sum(w_sum, 0), mask=v < V)
    if bias is not None:
        tl.store(dbias + part, tl.sum(b_sum, 0), mask=v < V)


@torch.library.custom_op("retentive::norm_gate", mutates_args=())
def norm_gate(
    o: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    act: str,
    eps: float,
) -> Tensor:
    """act(gate) ⊙ HeadNorm(o): y `[...,H·V]` in o's dtype.

    o `[...,H,V]`; gate `[...,H·V]`; weight and bias `[V]`, shared by the heads; `norm` of NORMS,
    `act` of ACTIVATIONS.
    Without a gate y is the norm, with norm "none" the gated o.
    """
    y = _output(o)
    launch_norm_gate(o, gate, weight, bias, norm, act, eps, y)
    return y


def launch_norm_gate(
    o: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    act: str,
    eps: float,
    y: Tensor,
    active: Tensor | None = None,
) -> None:
    """Into y, whose dtype need not be that of o; zero in slots, o `[B,...]`, not `active` `[B]`."""
    heads, dim = o.shape[-2:]
    gate = None if gate is None else _token_rows(gate)
    rows, tile = o.numel() // dim, _tile(dim, TILE)
    with torch.cuda.device_of(o):
        _forward_kernel[(cdiv(rows, tile["BLOCK_R"]),)](
            o.contiguous(), gate, weight, bias, active, y,
            rows, heads, rows // o.shape[0], 0 if gate is None else gate.stride(0), eps,
            NORM=norm, ACT=act, **tile, **OPTIONS,
        )  # fmt: skip


@torch.library.custom_op("retentive::norm_gate_backward", mutates_args=())
def norm_gate_backward(
    dy: Tensor,
    o: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    act: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of o, gate, weight and bias; empty for what there is not."""
    heads, dim = o.shape[-2:]
    rows, tile = o.numel() // dim, _tile(dim, BACKWARD_TILE)
    programs = cdiv(rows, tile["BLOCK_R"] * TILES)
    do = torch.empty_like(o, memory_format=torch.contiguous_format)
    dgate = _gradient(gate)
    sums = o.new_empty(2, programs, dim, dtype=torch.float32)
    flat = None if gate is None else _token_rows(gate)
    with torch.cuda.device_of(o):
        _backward_kernel[(programs,)](
            dy.contiguous(), o.contiguous(), flat, weight, bias, do, dgate, sums[0], sums[1],
            rows, heads, 0 if flat is None else flat.stride(0), eps,
            NORM=norm, ACT=act, TILES=TILES, **tile, **OPTIONS,
        )  # fmt: skip
    dweight, dbias = (
        o.new_empty(0) if x is None else part.sum(0).to(x.dtype)
        for x, part in zip((weight, bias), sums, strict=True)
    )
    return do, o.new_empty(0) if dgate is None else dgate, dweight, dbias


def _tile(dim: int, elements: int) -> dict[str, int]:
    """The constants of a kernel whose tile has so many elements, for heads of V = `dim`."""
    width = next_power_of_2(dim)
    return {"V": dim, "BLOCK_R": max(1, elements // width), "BLOCK_V": width}


def _output(o: Tensor) -> Tensor:
    return o.new_empty(*o.shape[:-2], o.shape[-2] * o.shape[-1])


def _token_rows(gate: Tensor) -> Tensor:
    """`[...,X]` -> `[tokens,X]`, a view also where it is a part of wider rows."""
    flat = gate.flatten(0, -2)
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _gradient(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)


@norm_gate.register_fake
def _(o, gate, weight, bias, norm, act, eps):
    return _output(o)


@norm_gate_backward.register_fake
def _(dy, o, gate, weight, bias, norm, act, eps):
    gradients = map(_gradient, (o, gate, weight, bias))
    return tuple(o.new_empty(0) if x is None else x for x in gradients)


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.norm, ctx.act, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy: Tensor):
    saved = ctx.saved_tensors  # asked for once: a checkpoint gives them once
    gradients = norm_gate_backward(dy, *saved, ctx.norm, ctx.act, ctx.eps)
    given = (None if x is None else dx for dx, x in zip(gradients, saved, strict=True))
    return *given, None, None, None


norm_gate.register_autograd(_backward, setup_context=_keep)


def cases(capability: int) -> Iterator[Case]:
    tensors = dict.fromkeys(("o", "gate", "y", "dy", "do", "dgate"), "*bf16")
    tensors |= dict.fromkeys(("weight", "bias", "dweight", "dbias"), "*fp32")
    numbers = dict.fromkeys(("rows", "heads", "rows_a_slot", "gate_token"), "i32")
    types = {**tensors, **numbers, "eps": "fp32", "active": None}
    kernels = (
        ("norm_gate", _forward_kernel, TILE),
        ("norm_gate_backward", _backward_kernel, BACKWARD_TILE),
    )
    ends = [
        *product((16, 128, 256, 512), (("layernorm", "swish"), ("rmsnorm", "gelu"))),
        *((128, ("none", act)) for act in ACTIVATIONS),
    ]
    for V, (norm, act) in ends:
        for name, kernel, elements in kernels:
            yield Case(
                f"{name}[V{V} {norm} {act}]",
                kernel,
                types,
                {"NORM": norm, "ACT": act, "TILES": TILES, **_tile(V, elements)},
                quick=V == 512 and norm == "layernorm",
            )
