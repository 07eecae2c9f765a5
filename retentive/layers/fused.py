"""What a layer computes around retention, in plain torch or by fused kernels: `around` chooses.

The kernels run where those of retention do (`retentive.ops.backends`): with the backend "triton",
and with "auto" on a GPU that has them. Shapes as in `layers`.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retentive.kernels.triton.available import unavailable
from retentive.layers.layout import Angles, rotate


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

Norm = Callable[[Tensor], Tensor]
"""nn.LayerNorm, nn.RMSNorm, or what leaves x as it is."""


class Plain:
    @staticmethod
    def rotate(q: Tensor, k: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """q `[B,T,H,K]` and k `[B,T,G,K]` turned by their positions."""
        return rotate(q, angles.cos, angles.sin), rotate(k, angles.key_cos, angles.key_sin)

    @staticmethod
    def norm_gate(o: Tensor, gate: Tensor | None, norm: Norm, act: str) -> Tensor:
        """act(gate) ⊙ norm(o) `[B,T,H·V]` for o `[B,T,H,V]` and gate `[B,T,H·V]`."""
        normed = norm(o).flatten(-2)
        return normed if gate is None else ACTIVATIONS[act](gate) * normed


class Fused:
    """The same in a launch each, forward and backward."""

    @staticmethod
    def rotate(q: Tensor, k: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        from retentive.kernels.triton.rotation import rotate_qk

        return rotate_qk(q, k, *angles)

    @staticmethod
    def norm_gate(o: Tensor, gate: Tensor | None, norm: Norm, act: str) -> Tensor:
        from retentive.kernels.triton.norm_gate import norm_gate

        kind, weight, bias, eps = norm_parts(norm)
        return norm_gate(o, gate, weight, bias, kind, act, eps)


def around(backend: str, x: Tensor) -> type[Plain] | type[Fused]:
    """What runs for a layer of this backend and its projections x."""
    asked = backend == "triton" or (backend == "auto" and x.device.type == "cuda")
    if not asked or x.dtype == torch.float64 or unavailable(x.device.type, x.device.index):
        return Plain
    return Fused


def norm_parts(norm: Norm) -> tuple[str, Tensor | None, Tensor | None, float]:
    """Kind, weight, bias and eps of a head's norm, or of what is in its place."""
    if isinstance(norm, nn.LayerNorm):
        return "layernorm", norm.weight, norm.bias, norm.eps
    if isinstance(norm, nn.RMSNorm):
        assert norm.eps is not None
        return "rmsnorm", norm.weight, None, norm.eps
    return "none", None, None, 0.0
