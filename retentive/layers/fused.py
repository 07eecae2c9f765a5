"""The elementwise work around retention, in plain torch or by one kernel each.

The kernels run where those of retention do (`retentive.ops.backends`): with the backend "triton",
and with "auto" on a GPU that has them.
Shapes: B rows, T tokens, H heads, G key heads, K and V head dims.
"""

from torch import Tensor

from retentive.kernels.triton.available import unavailable
from retentive.layers.activations import ACTIVATIONS
from retentive.layers.parts import TensorFn, norm_parts
from retentive.layers.rotation import Angles, rotate


def fuses(backend: str, x: Tensor) -> bool:
    """Whether a layer of this backend uses the kernels for activations like x."""
    asked = backend == "triton" or (backend == "auto" and x.device.type == "cuda")
    return asked and x.dtype.itemsize < 8 and not unavailable(x.device.type, x.device.index)


def rotate_qk(q: Tensor, k: Tensor, angles: Angles, backend: str) -> tuple[Tensor, Tensor]:
    """q `[B,T,H,K]` and k `[B,T,G,K]` turned by their positions."""
    if fuses(backend, q):
        from retentive.kernels.triton.rotation import rotate_qk

        return rotate_qk(q, k, *angles)
    return rotate(q, angles.cos, angles.sin), rotate(k, angles.key_cos, angles.key_sin)


def norm_gate(o: Tensor, gate: Tensor | None, norm: TensorFn, act: str, backend: str) -> Tensor:
    """act(gate) ⊙ norm(o) `[B,T,H·V]` for o `[B,T,H,V]` and gate `[B,T,H·V]`."""
    if fuses(backend, o):
        from retentive.kernels.triton.norm_gate import norm_gate

        kind, weight, bias, eps = norm_parts(norm)
        return norm_gate(o, gate, weight, bias, kind, act, eps)
    normed = norm(o).flatten(-2)
    return normed if gate is None else ACTIVATIONS[act](gate) * normed
