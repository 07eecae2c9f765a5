"""Activations by the names that configs have."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "swish"]


def quick_gelu(x: Tensor) -> Tensor:
    """x σ(1.702 x), by which GELU is sometimes approximated."""
    return x * torch.sigmoid(1.702 * x)


def relu2(x: Tensor) -> Tensor:
    """The square of ReLU (arXiv 2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu2": relu2,
    "swish": F.silu,
}
