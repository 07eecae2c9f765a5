"""Linear layers that take the faster of torch's two matrix libraries on a CPU.

torch multiplies float32 matrices by MKL, which leaves half of the vector units of many processors
unused (AVX-512 on AMD). oneDNN does not, and is in every build of torch.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from retentive.layers.norms import Normed, again
from retentive.transforms import differentiable_once, transformed

MANY_ROWS = 64  # from where on a product with its backward is faster, which transposes weights


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b for x `[...,in]` and W `[out,in]`; these may be transposed views. Keeps no graph."""
    if suits_onednn(x) and (weight.dtype, weight.shape[1]) == (x.dtype, x.shape[-1]):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def suits_onednn(x: Tensor) -> bool:
    """Whether a product of the rows of x `[...,in]` is oneDNN's; a compiler chooses by itself."""
    return (
        not torch.compiler.is_compiling()
        and not transformed(x)
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() >= x.shape[-1] * (MANY_ROWS if torch.is_grad_enabled() else 1)
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )


class Linear(nn.Linear):
    """nn.Linear, faster on a CPU, and without a bias unless asked for one.

    There, with gradients from MANY_ROWS rows on, its backward is differentiable once (by
    torch.func any number of times: `retentive.transforms`).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias)

    def forward(self, input: Tensor) -> Tensor:
        if not suits_onednn(input):
            return F.linear(input, self.weight, self.bias)
        if not torch.is_grad_enabled():
            return product(input, self.weight, self.bias)
        x = input.flatten(0, -2)
        kept = _Kept.apply(x, self.weight, Normed.of(input))
        return _Product.apply(x, self.weight, self.bias, kept).unflatten(0, input.shape[:-1])


class _Kept(Function):
    """Keeps what the backward of their product needs of x and W, before it is formed.

    Where x is not kept but computed again (`layers.Recomputing`), that ends with what is kept last:
    kept by the product itself, after it was formed, they would have it formed once more in vain.
    In the place of an x that a norm gave there is what it was made of.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, normed: Normed | None) -> Tensor:
        return x.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, normed = inputs
        trained_x, trained_weight, _ = ctx.needs_input_grad
        parts: tuple[Tensor | None, ...] = ()
        if trained_weight:
            parts = (x,) if normed is None else (normed.x, normed.weight, normed.r)
        ctx.save_for_backward(weight if trained_x else None, *parts)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *_: Tensor) -> tuple[None, None, None]:
        return None, None, None


class _Product(Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor) -> Tensor:
        return product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.kept = inputs[3].grad_fn

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), dx, dweight = gradients, None, None
        if ctx.kept is not None:  # not only the bias is trained
            weight, *parts = ctx.kept.saved_tensors
            dx = product(dy, weight.T) if ctx.needs_input_grad[0] else None
            if ctx.needs_input_grad[1]:
                x = parts[0] if len(parts) == 1 else again(*parts).flatten(0, -2)
                dweight = product(dy.T, x.T)
        dbias = dy.sum(0) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, None
