"""Where torch differentiates or maps a function as a whole: forward mode, vmap, torch.func.

Operators with a backward of their own know reverse mode only, once. Under a transform their callers
take plain operations instead, which torch can differentiate and map in any way.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from retentive.errors import InputError


def transformed(*tensors: Tensor | None) -> bool:
    """Whether a call on these tensors is under a transform (torch.func, vmap, forward_ad)."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    given = (x for x in tensors if x is not None)
    return any(forward_ad.unpack_dual(x).tangent is not None for x in given)


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward of plain numbers: whoever differentiates its gradients gets an InputError."""

    @wraps(backward)
    def wrapped(ctx: Any, *gradients: Tensor | None) -> Any:
        with torch.no_grad():
            found = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return found
        return tuple(x if x is None else _Once.apply(x.detach().requires_grad_()) for x in found)

    return wrapped


class _Once(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise InputError(
            "a second derivative goes through a fast backward, which is differentiable once;"
            " take it by torch.func, such as torch.func.hessian, or jvp of grad"
        )
