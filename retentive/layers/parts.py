"""Small parts that blocks are made of, and how their vectors are initialized."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.utils.checkpoint import checkpoint

from retentive.layers.norms import RMSNorm
from retentive.transforms import transformed

TensorFn = Callable[[Tensor], Tensor]
"""A module, or a function in its place."""
Norm = Literal["layernorm", "rmsnorm"]
OptionalNorm = Literal["layernorm", "rmsnorm", "none"]


class Recomputing(nn.Module):
    """A part of a block that saves little for its backward, unless its block is recomputed."""

    recompute = True  # False where the whole block is recomputed anyway

    def recomputed(self, segment: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """`segment(*inputs)`, of which only the inputs are saved for the backward.

        The backward runs it again up to the last tensor it needs: of some elementwise steps and a
        projection after them the steps, which cost memory, but not the product, which costs time.
        """
        if not (self.recompute and torch.is_grad_enabled()) or transformed(*inputs):
            return segment(*inputs)
        draws = any(isinstance(part, nn.Dropout) for part in self.modules())  # an adapter's
        return checkpoint(segment, *inputs, use_reentrant=False, preserve_rng_state=draws)


def identity(x: Tensor) -> Tensor:
    """In place of a layer that is not there; a call of nn.Identity takes ten times as long."""
    return x


class Repeated(nn.Module):
    """Repeats the keys or values `[...,G,X]` of each group for all of its heads: `[...,H,X]`."""

    def __init__(self, times: int):
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.times, -2)


class Scaled(nn.Module):
    """x times a constant."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def dropout(probability: float) -> TensorFn:
    """nn.Dropout, or the identity where nothing is dropped."""
    return nn.Dropout(probability) if probability else identity


def make_norm(kind: OptionalNorm, size: int, eps: float, affine: bool = True) -> TensorFn:
    """A norm over the last dim of `size`; the identity for "none"."""
    if kind == "none":
        return identity
    made = nn.LayerNorm if kind == "layernorm" else RMSNorm
    return made(size, eps=eps, elementwise_affine=affine)


def norm_parts(norm: TensorFn) -> tuple[str, Tensor | None, Tensor | None, float]:
    """Kind, weight, bias and eps of what `make_norm` gave."""
    if isinstance(norm, nn.LayerNorm):
        return "layernorm", norm.weight, norm.bias, norm.eps
    if isinstance(norm, nn.RMSNorm):
        assert norm.eps is not None
        return "rmsnorm", norm.weight, None, norm.eps
    return "none", None, None, 0.0


def reset_vectors(module: nn.Module) -> None:
    """Initializes norms (weights 1, biases 0) and the biases of linear layers (0)."""
    for part in module.modules():
        if isinstance(part, nn.LayerNorm | nn.RMSNorm):
            part.reset_parameters()
        elif isinstance(part, nn.Linear) and part.bias is not None:
            init.zeros_(part.bias)


def deepnet_gain(depth: int) -> float:
    """β = (8L)^(-1/4), by which DeepNet (arXiv 2203.00555) scales what writes to the residual."""
    return (8 * depth) ** -0.25
