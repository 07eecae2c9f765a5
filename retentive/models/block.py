"""A layer of a model: a mixer of tokens and an FFN, and how they join the stream of hidden states.

Shapes: B rows, T tokens, D width; x `[B,T,D]`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from retentive.layers.layout import Layout
from retentive.mixers.retention import Layer, dropout
from retentive.models.config import ModelConfig
from retentive.models.state import LayerState

Kept = TypeVar("Kept")
Mixer = Callable[[Tensor], tuple[Tensor, Kept]]
"""x -> y and what the mixer remembers of it."""


class Block(nn.Module):
    """What a `LanguageModel` asks of its layers."""

    def forward(self, x: Tensor, state: Any, layout: Layout) -> tuple[Tensor, Any]:
        """x and the state after these tokens, going on from `state`, which is left as it is."""
        raise NotImplementedError

    def init_weights(self, config: Any, generator: torch.Generator | None) -> None:
        raise NotImplementedError

    def empty_state(self, batch: int, capacity: int | None, like: Tensor) -> LayerState:
        """Of rows that have read nothing, on the device of `like` and in the dtype it asks for."""
        raise NotImplementedError

    @property
    def state_signature(self) -> tuple[Any, ...]:
        """The `signature` of this layer's states."""
        raise NotImplementedError


class Join(nn.Module):
    """The way of a block through its two parts f; X' = a X + Y is how each of them ends."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.scale = config.residual_scale
        self.dropout = dropout(config)

    def forward(
        self, x: Tensor, mix: Mixer[Kept], mix_norm: Layer, ffn: Layer, ffn_norm: Layer
    ) -> tuple[Tensor, Kept]:
        raise NotImplementedError

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.add(self.dropout(y), x, alpha=self.scale)


class PreNorm(Join):
    """a X + f(Norm(X))."""

    def forward(
        self, x: Tensor, mix: Mixer[Kept], mix_norm: Layer, ffn: Layer, ffn_norm: Layer
    ) -> tuple[Tensor, Kept]:
        y, kept = mix(mix_norm(x))
        x = self.add(x, y)
        return self.add(x, ffn(ffn_norm(x))), kept


class PostNorm(Join):
    """Norm(a X + f(X))."""

    def forward(
        self, x: Tensor, mix: Mixer[Kept], mix_norm: Layer, ffn: Layer, ffn_norm: Layer
    ) -> tuple[Tensor, Kept]:
        y, kept = mix(x)
        x = mix_norm(self.add(x, y))
        return ffn_norm(self.add(x, ffn(x))), kept


class OutputNorm(Join):
    """a X + Norm(f(X))."""

    def forward(
        self, x: Tensor, mix: Mixer[Kept], mix_norm: Layer, ffn: Layer, ffn_norm: Layer
    ) -> tuple[Tensor, Kept]:
        y, kept = mix(x)
        x = self.add(x, mix_norm(y))
        return self.add(x, ffn_norm(ffn(x))), kept


class Parallel(Join):
    """a X + mixer(Norm₁(X)) + FFN(Norm₂(X))."""

    def forward(
        self, x: Tensor, mix: Mixer[Kept], mix_norm: Layer, ffn: Layer, ffn_norm: Layer
    ) -> tuple[Tensor, Kept]:
        y, kept = mix(mix_norm(x))
        return self.add(x, y + ffn(ffn_norm(x))), kept


JOINS: dict[str, type[Join]] = {
    "pre-norm": PreNorm,
    "post-norm": PostNorm,
    "output-norm": OutputNorm,
    "parallel": Parallel,
}
