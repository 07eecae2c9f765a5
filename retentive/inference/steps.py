"""A block's step as plain functions, whose parts are looked up once.

Beside its four products a step of a block is some thirty operations of a few microseconds each, and
to call a module costs as much as one of them: on a CPU a tenth of a token.

Shapes: B rows, D width, H heads, K and V head dims; x, h `[B,D]`, S `[B,H,K,V]`.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from retentive.inference.packed import FusedProjections
from retentive.models.fused import Fused, around
from retentive.models.layers import FeedForward, Layer, MultiScaleRetention, unchanged
from retentive.models.layout import rotate
from retentive.models.retnet import RetNetBlock

Mix = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(h, S, gamma `[H,1|K,1]`, cos, sin `[B,2,H|1,K]`) -> y `[B,D]`; S is updated in place."""


@runtime_checkable
class HasFunction(Protocol):
    def function(self) -> Layer: ...


def function(layer: Layer, device: torch.device) -> Layer:
    """What `layer` computes, of the weights it has now."""
    if device.type != "cpu":
        return layer
    if isinstance(layer, HasFunction):
        return layer.function()
    if isinstance(layer, nn.LayerNorm):
        shape, weight, bias, eps = layer.normalized_shape, layer.weight, layer.bias, layer.eps
        return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
    return layer


class BlockStep:
    """x -> x through a block, one token a row; `mix` is in the place of its retention."""

    def __init__(self, block: RetNetBlock, mix: Mix, device: torch.device):
        self._join, self._mix = block.join.forward, mix
        self._norms = function(block.retention_norm, device), function(block.ffn_norm, device)
        self._ffn = feed_forward(block.ffn, device)

    def __call__(self, x: Tensor, S: Tensor, gamma: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def mix(h: Tensor) -> tuple[Tensor, None]:
            return self._mix(h, S, gamma, cos, sin), None

        mix_norm, ffn_norm = self._norms
        return self._join(x, mix, mix_norm, self._ffn, ffn_norm)[0]


class RetentionStep:
    """A `Mix` of torch's operations."""

    def __init__(self, retention: MultiScaleRetention, like: Tensor):
        """like: of the dtype and on the device of h."""
        self._project, self._share = projections(retention), retention.share
        kernels = around(retention.backend, like)
        norm = retention.head_norm
        self._norm = norm if kernels is Fused else function(norm, like.device)
        self._norm_gate, self._act = kernels.norm_gate, retention.gate_act
        self._output = function(retention.o_proj, like.device)

    def __call__(self, h: Tensor, S: Tensor, gamma: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        pairs, v, gate = self._project(h)
        q, k = rotate(pairs.to(S.dtype), cos, sin).unbind(1)
        o = retain(S, gamma, q, k, self._share(v).to(S.dtype)).to(h.dtype)
        return self._output(self._norm_gate(o, gate, self._norm, self._act))


def retain(S: Tensor, gamma: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """S ← γ S + kᵀ v, o = q S for q, k `[B,H,K]` and o, v `[B,H,V]` (paper §2.2).

    With xPos γ is that of a channel, a row of S.
    """
    S.mul_(gamma).addcmul_(k.unsqueeze(-1), v.unsqueeze(-2))
    return torch.bmm(q.flatten(0, 1).unsqueeze(1), S.flatten(0, 1)).view(v.shape)


def projections(
    retention: MultiScaleRetention,
) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]:
    """h -> queries and keys `[B,2,H,K]`, values `[B,G,V]` and the gate `[B,H·V]`."""
    (H, K, V), share = retention.state_shape, retention.share

    def apart(h: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        q, k, v, gate = retention.project(h)
        q, k = q.view(len(h), H, K), k.view(len(h), -1, K)
        return torch.stack((q, share(k)), 1), v.view(len(h), -1, V), gate

    fused = retention.fused_proj
    if not isinstance(fused, FusedProjections) or share is not unchanged:
        return apart
    product, (q_width, k_width, *widths) = fused.function(), fused.widths

    def joined(h: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        pairs, v, *gate = product(h).split([q_width + k_width, *widths], -1)
        return pairs.view(-1, 2, H, K), v.view(-1, H, V), gate[0] if gate else None

    return joined


def feed_forward(ffn: FeedForward, device: torch.device) -> Layer:
    fused = ffn.fused_proj
    if not isinstance(fused, FusedProjections):
        return ffn
    product, widths, act = fused.function(), fused.widths, ffn.act
    subln, down = function(ffn.subln, device), function(ffn.down_proj, device)
    if len(widths) == 1:
        return lambda x: down(subln(act(product(x))))

    def gated(x: Tensor) -> Tensor:
        up, gate = product(x).split(widths, -1)
        return down(subln(act(gate).mul_(up)))

    return gated
