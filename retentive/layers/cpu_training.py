"""Fast training on a CPU: products of linear layers by oneDNN, RMSNorm of few passes, less saved.

A newcomer can skip this file: `Linear` and `RMSNorm` compute what torch's do, and take it where it
is faster. torch multiplies float32 matrices by MKL, which leaves half of the vector units of many
processors unused (AVX-512 on AMD); oneDNN does not, and is in every build of torch. A norm and the
linear layers behind it share what they save for the backward: the norm's inputs, never its output.

Shapes: x `[...,D]` or `[...,in]`, weight of a norm `[D]`, of a product `[out,in]`, r `[...,1]`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b of an x that `suits_onednn`, with its backward."""
    if not torch.is_grad_enabled():
        return product(x, weight, bias)
    rows = x.flatten(0, -2)
    saved = _SavedInputs.apply(rows, weight, NormInputs.of_output(x))
    return _Product.apply(rows, weight, bias, saved).unflatten(0, x.shape[:-1])


class NormInputs(NamedTuple):
    """What the output of a norm is made of: the norm saves it, so for others it is free."""

    x: Tensor
    weight: Tensor | None
    r: Tensor
    version: int

    @classmethod
    def of_output(cls, y: Tensor) -> "NormInputs | None":
        """Those of y, if a norm made it and nothing has changed it since; else None."""
        made_of = getattr(y, "norm_inputs", None)
        return made_of if made_of is not None and made_of.version == y._version else None


class _SavedInputs(Function):
    """Saves what the matmul's backward needs *before* the matmul.

    Activation recomputation (`parts.Recomputing`) stops at the last saved tensor, so the matmul
    itself is not recomputed. If x is the output of RMSNorm, the norm's inputs are saved instead.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, normed: NormInputs | None) -> Tensor:
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
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, saved: Tensor) -> Tensor:
        return product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.saved_by = inputs[3].grad_fn

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), dx, dweight = gradients, None, None
        if ctx.saved_by is not None:  # not only the bias is trained
            weight, *parts = ctx.saved_by.saved_tensors
            dx = product(dy, weight.T) if ctx.needs_input_grad[0] else None
            if ctx.needs_input_grad[1]:
                x = parts[0] if len(parts) == 1 else recompute_norm(*parts).flatten(0, -2)
                dweight = product(dy.T, x.T)
        dbias = dy.sum(0) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, None


MANY_VALUES = 2**15  # values, from where on passes cost more than calls


def suits_rms_norm(x: Tensor, weight: Tensor | None) -> bool:
    """Whether RMSNorm of x is ours; at few tokens calls cost more than passes.

    The compiler is asked first: a size that it compares becomes a limit of what it makes.
    """
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.numel() >= MANY_VALUES
        and not transformed(x, weight)
    )


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """torch's composes it of many passes and saves x three times over; low precision in float32."""
    if not torch.is_grad_enabled():
        return _rms_norm(x, weight, eps)[0]
    y, r = _RMSNorm.apply(x, weight, eps)
    y.norm_inputs = NormInputs(x, weight, r, y._version)  # for the linear layer that reads y
    return y


def recompute_norm(x: Tensor, weight: Tensor | None, r: Tensor) -> Tensor:
    """Recomputes the normalized output from its saved inputs; bit-identical."""
    y = _exact(x) * r
    return (y if weight is None else y.mul_(weight)).to(x.dtype)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """y = x r w and r = √D / √(|x|² + D eps)."""
    exact, size = _exact(x), x.shape[-1]
    r = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
    r = r.square_().add_(size * eps).rsqrt_().mul_(size**0.5)
    return recompute_norm(x, weight, r), r


class _RMSNorm(Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        return _rms_norm(x, weight, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, output[1])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """With x̂ = x r:  dx = r (w dy - x̂ mean(w dy x̂))  and  dw = Σ dy x̂ over all tokens."""
        x, weight, r = ctx.saved_tensors
        dy, normed = _exact(gradients[0]), _exact(x) * r
        along = dy * normed
        if weight is None:
            dweight, dx, mean = None, dy.clone(), along.mean(-1, keepdim=True)
        else:
            dweight = along.flatten(0, -2).sum(0).to(weight.dtype)
            dx, mean = dy * weight, (along @ weight.to(along.dtype)).div_(x.shape[-1]).unsqueeze(-1)
        dx = dx.addcmul_(normed, mean, value=-1).mul_(r)
        return dx.to(x.dtype), dweight, None


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
