"""Rotary positions: pairs of a head's dims turned by angles that grow with the position.

Shapes: B rows, T tokens, H heads, K head dim; q and k `[B,T,H,K]`, positions int64 `[B|1,T]`.
"""

from collections.abc import Callable, Hashable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retentive.ops.decay import row_scale
from retentive.transforms import transformed

RotationRule = Literal["official", "rope", "rope-across-heads"]


class Constant(nn.Module):
    """A float64 vector on the device of its module's parameters, and otherwise fixed.

    It is no buffer: `.to(dtype)`, `to_empty` and checkpoints leave its values alone.
    """

    def __init__(self, value: Tensor):
        super().__init__()
        self.value = value
        self._follow(torch.empty(0).device)  # where a parameter made now would be

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        self._follow(fn(torch.empty(0, device=self.value.device)).device)
        return super()._apply(fn, recurse)

    def _follow(self, device: torch.device) -> None:
        if device.type not in ("meta", "mps"):  # one has no values, the other no float64
            self.value = self.value.to(device)

    def on(self, device: torch.device) -> Tensor:
        """The vector on `device`; in float32 where there is no float64."""
        value = self.value.float() if device.type == "mps" else self.value
        return value.to(device)


class Angles(NamedTuple):
    """The factors that `rotate` takes, for queries and for keys: `[B|1,T,1|H,K]`."""

    cos: Tensor
    sin: Tensor
    key_cos: Tensor
    key_sin: Tensor


def exponents(rule: RotationRule, pairs: int, heads: int = 1) -> Tensor:
    """e of θ = base^(-e), float64 `[1|heads,pairs]`, by a `RotationRule`."""
    if rule != "rope-across-heads":
        heads = 1  # stands for all
    p = torch.arange(heads * pairs, dtype=torch.float64, device="cpu").view(heads, pairs)
    return p / max(pairs - 1, 1) if rule == "official" else p / (heads * pairs)


class Rotation(nn.Module):
    """Turns the pair (p, p + K/2) of each head at position n by the angle n·θ_p.

    `rule` and `base`: see `exponents`. With a `rotary_dim` only that many dims turn, the pairs
    p < rotary_dim/2. Factors that belong to a position are multiplied into the cosines and sines:
    `key_scale` for keys, and for queries, if `scale_by` gives log γ `[H]`, the row scale. All of it
    is computed in float64 from integer positions, then cast: in float32 an angle is off by 0.05 at
    position 10^6.

    Layers whose rotations have the same `key` share their angles (`Layout.angles`).
    """

    def __init__(
        self,
        head_dim: int,
        rule: RotationRule,
        base: float,
        key_scale: float = 1.0,
        scale_by: Tensor | None = None,
        *,
        rotary_dim: int | None = None,
        heads: int = 1,
    ):
        super().__init__()
        pairs = (rotary_dim or head_dim) // 2
        theta = base ** -exponents(rule, pairs, heads)
        self.frequencies = Constant(F.pad(theta, (0, head_dim // 2 - pairs)))
        self.key_scale = key_scale
        self.scale_by = None if scale_by is None else Constant(scale_by)
        scales = None if scale_by is None else tuple(scale_by.tolist())
        self.key: Hashable = (head_dim, rule, base, key_scale, scales, pairs, heads)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        """For int64 positions `[B|1,T]`; `dtype` is float64 for a float64 model, else float32."""
        frequencies = self.frequencies.value
        exact = positions.to(frequencies.device)
        angles = exact[..., None, None] * frequencies
        cos, sin = (x.to(dtype).to(positions.device) for x in (angles.cos(), angles.sin()))
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        keys = cos * self.key_scale, sin * self.key_scale
        if self.scale_by is not None:
            scale = row_scale(self.scale_by.value, exact).to(dtype).to(positions.device)
            cos, sin = cos * scale.unsqueeze(-1), sin * scale.unsqueeze(-1)
        return Angles(cos, sin, *keys)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin), a and b the halves of each head of x `[B,T,H,K]`.

    The signs are in `sin`. Computed in the dtype of the angles, then cast back to that of x.
    """
    exact = x.to(cos.dtype)
    turned, other = exact * cos, exact.roll(x.shape[-1] // 2, -1)
    if transformed(x):  # which has no rule for the product in place
        return turned.addcmul(other, sin).to(x.dtype)
    return turned.addcmul_(other, sin).to(x.dtype)
