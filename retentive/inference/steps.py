"""A block's step as functions. Where a model is packed they are plain ones, looked up once.

Beside its four products a step of a block is some thirty operations of a few microseconds each, and
to find and call a module costs as much as one of them: a tenth of a token. The modules of a packed
model can no longer change; those of any other may, by an adapter or a hook, and are called.

Shapes: B rows, D width, G key and value heads, H heads, K and V head dims; x, h `[B,D]`, S
`[B,H,K,V]`.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from retentive.inference.packed import FusedProjections
from retentive.models.block import Mixer
from retentive.models.fused import Plain
from retentive.models.layers import FeedForward, Layer, MultiScaleRetention, unchanged
from retentive.models.layout import rotate
from retentive.models.retnet import RetNetBlock

Mix = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(h, S, gamma `[H,1|K,1]`, cos, sin `[B,2,H|1,K]`) -> y `[B,D]`; S is updated in place."""


@runtime_checkable
class HasFunction(Protocol):
    def function(self) -> Layer: ...


def function(layer: Layer) -> Layer:
    """What a `layer` of a packed model computes."""
    if isinstance(layer, HasFunction):
        return layer.function()
    if isinstance(layer, nn.LayerNorm):
        shape, weight, bias, eps = layer.normalized_shape, layer.weight, layer.bias, layer.eps
        return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
    return layer


class BlockStep:
    """x -> x through a block, one token a row; `mix` is in the place of its retention."""

    def __init__(self, block: RetNetBlock, mix: Mix):
        self._around, self._mix = around(block), mix

    def __call__(self, x: Tensor, S: Tensor, gamma: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def mix(h: Tensor) -> tuple[Tensor, None]:
            return self._mix(h, S, gamma, cos, sin), None

        return self._around(x, mix)[0]


def around(block: RetNetBlock) -> Callable[[Tensor, Mixer[Any]], tuple[Tensor, Any]]:
    """`RetNetBlock.around`."""
    if block.ffn.fused_proj is None:
        return block.around
    join, ffn = block.join.forward, feed_forward(block.ffn)
    mix_norm, ffn_norm = function(block.retention_norm), function(block.ffn_norm)
    return lambda x, mix: join(x, mix, mix_norm, ffn, ffn_norm)


def feed_forward(ffn: FeedForward) -> Layer:
    """A packed one's."""
    assert isinstance(ffn.fused_proj, FusedProjections)
    product, widths, act = function(ffn.fused_proj.product), ffn.fused_proj.widths, ffn.act
    subln, down = function(ffn.subln), function(ffn.down_proj)
    if len(widths) == 1:
        return lambda x: down(subln(act(product(x))))

    def gated(x: Tensor) -> Tensor:
        up, gate = product(x).split(widths, -1)
        return down(subln(act(gate).mul_(up)))

    return gated


class RetentionStep:
    """A `Mix` of torch's operations."""

    def __init__(self, retention: MultiScaleRetention):
        self._project, self._share = projections(retention), retention.share
        self._output = output(retention)

    def __call__(self, h: Tensor, S: Tensor, gamma: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        pairs, v, gate = self._project(h)
        q, k = rotate(pairs.to(S.dtype), cos, sin).unbind(1)
        o = retain(S, gamma, q, k, self._share(v).to(S.dtype))
        return self._output(o.to(h.dtype), gate)


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
        q, k, v = (y.unflatten(-1, (-1, n)) for y, n in ((q, K), (k, K), (v, V)))
        return torch.stack((q, share(k)), 1), v, gate

    fused = retention.fused_proj
    if not isinstance(fused, FusedProjections) or share is not unchanged:
        return apart
    product, (q_width, k_width, *widths) = function(fused.product), fused.widths

    def joined(h: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        pairs, v, *gate = product(h).split([q_width + k_width, *widths], -1)
        return pairs.view(-1, 2, H, K), v.view(-1, H, V), gate[0] if gate else None

    return joined


def output(retention: MultiScaleRetention) -> Callable[[Tensor, Tensor | None], Tensor]:
    """`MultiScaleRetention.output`."""
    if retention.fused_proj is None:
        return retention.output
    norm, project = function(retention.head_norm), function(retention.o_proj)
    act = retention.gate_act
    return lambda o, gate: project(Plain.norm_gate(o, gate, norm, act))
