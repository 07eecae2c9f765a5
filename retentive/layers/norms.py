"""RMSNorm on a CPU, where torch's is composed of many passes and keeps x three times over.

At few tokens the reverse holds: there calls cost more than passes, and torch's own is taken.

Shapes: x `[...,D]`, weight `[D]`, r `[...,1]`. Low precision is computed in float32, then cast.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from retentive.transforms import differentiable_once, transformed

MANY = 2**15  # values, from where on passes cost more than calls


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm; for many tokens on a CPU its backward is differentiable once."""

    def forward(self, x: Tensor) -> Tensor:
        # The compiler is asked first: a size that it compares becomes a limit of what it makes.
        if torch.compiler.is_compiling() or x.device.type != "cpu" or x.numel() < MANY:
            return super().forward(x)
        if transformed(x, self.weight):
            return super().forward(x)
        assert self.eps is not None
        if not torch.is_grad_enabled():
            return _rms_norm(x, self.weight, self.eps)[0]
        y, r = _RMSNorm.apply(x, self.weight, self.eps)
        y.normed = Normed(x, self.weight, r, y._version)
        return y


class Normed(NamedTuple):
    """What y is made of. The norm keeps it for its backward; kept by others it costs nothing."""

    x: Tensor
    weight: Tensor | None
    r: Tensor
    version: int

    @classmethod
    def of(cls, y: Tensor) -> "Normed | None":
        """Of what a norm gave and nothing has changed since; None for any other tensor."""
        normed = getattr(y, "normed", None)
        return normed if normed is not None and normed.version == y._version else None


def again(x: Tensor, weight: Tensor | None, r: Tensor) -> Tensor:
    """y, to the last bit."""
    y = _exact(x) * r
    return (y if weight is None else y.mul_(weight)).to(x.dtype)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """y = x r w and r = √D / √(|x|² + D eps)."""
    exact, size = _exact(x), x.shape[-1]
    r = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
    r = r.square_().add_(size * eps).rsqrt_().mul_(size**0.5)
    return again(x, weight, r), r


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
