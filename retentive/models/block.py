"""A layer of a model: a mixer and an FFN, wired to the residual stream.

Shapes: B rows, T tokens, D width; x `[B,T,D]`, in a decoding step `[B,D]`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from retentive.layers.feed_forward import FeedForward
from retentive.layers.layout import Layout
from retentive.layers.parts import TensorFn, dropout, make_norm
from retentive.mixers import build
from retentive.mixers.base import Mixer, MixerConfig
from retentive.models.config import ModelConfig

MixFn = Callable[[Any], tuple[Any, Any]]
"""x -> y and the state of the mixer after it."""


class Residual(nn.Module):
    """Residual wiring of a block: where its two sublayers f (mixer, FFN) are normalized and how
    they are added, X ← a·X + f(X).

    It runs on tensors, and on the rows of a decode program, which can be added and nothing else.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.scale = config.residual_scale
        self.dropout = dropout(config.dropout)

    def forward(
        self, x: Any, mix: MixFn, mix_norm: TensorFn, ffn: TensorFn, ffn_norm: TensorFn
    ) -> tuple[Any, Any]:
        """x after the block, and the state of its mixer."""
        raise NotImplementedError

    def add(self, x: Any, y: Any) -> Any:
        """a x + y"""
        if not isinstance(x, Tensor):
            return x.plus(y, self.scale)
        return torch.add(self.dropout(y), x, alpha=self.scale)


class PreNorm(Residual):
    """a X + f(Norm(X))."""

    def forward(
        self, x: Any, mix: MixFn, mix_norm: TensorFn, ffn: TensorFn, ffn_norm: TensorFn
    ) -> tuple[Any, Any]:
        y, state = mix(mix_norm(x))
        x = self.add(x, y)
        return self.add(x, ffn(ffn_norm(x))), state


class PostNorm(Residual):
    """Norm(a X + f(X))."""

    def forward(
        self, x: Any, mix: MixFn, mix_norm: TensorFn, ffn: TensorFn, ffn_norm: TensorFn
    ) -> tuple[Any, Any]:
        y, state = mix(x)
        x = mix_norm(self.add(x, y))
        return ffn_norm(self.add(x, ffn(x))), state


class OutputNorm(Residual):
    """a X + Norm(f(X))."""

    def forward(
        self, x: Any, mix: MixFn, mix_norm: TensorFn, ffn: TensorFn, ffn_norm: TensorFn
    ) -> tuple[Any, Any]:
        y, state = mix(x)
        x = self.add(x, mix_norm(y))
        return self.add(x, ffn_norm(ffn(x))), state


class Parallel(Residual):
    """a X + mixer(Norm₁(X)) + FFN(Norm₂(X))."""

    def forward(
        self, x: Any, mix: MixFn, mix_norm: TensorFn, ffn: TensorFn, ffn_norm: TensorFn
    ) -> tuple[Any, Any]:
        y, state = mix(mix_norm(x))
        return self.add(x, y + ffn(ffn_norm(x))), state


class MixerOnly(Residual):
    """a X + mixer(Norm(X)): a block without an FFN."""

    def forward(
        self, x: Any, mix: MixFn, mix_norm: TensorFn, ffn: TensorFn, ffn_norm: TensorFn
    ) -> tuple[Any, Any]:
        y, state = mix(mix_norm(x))
        return self.add(x, y), state


RESIDUALS: dict[str, type[Residual]] = {
    "pre-norm": PreNorm,
    "post-norm": PostNorm,
    "output-norm": OutputNorm,
    "parallel": Parallel,
    "mixer-only": MixerOnly,
}


class Block(nn.Module):
    """A mixer and an FFN. The mixer and its norm are registered under the mixer's name."""

    def __init__(self, config: ModelConfig, mixer: MixerConfig):
        super().__init__()
        make = partial(make_norm, config.norm, config.hidden_size, config.norm_eps)
        made = build(config.hidden_size, mixer)
        self.mixer_name = made.name.replace("-", "_")
        setattr(self, f"{self.mixer_name}_norm", make())
        setattr(self, self.mixer_name, made)
        if config.block != "mixer-only":
            self.ffn_norm = make()
            self.ffn = FeedForward(config.hidden_size, config.ffn, config.norm_eps)
        self.residual = RESIDUALS[config.block](config)

    @property
    def mixer(self) -> Mixer:
        return cast(Mixer, getattr(self, self.mixer_name))

    @property
    def mixer_norm(self) -> TensorFn:
        return cast(TensorFn, getattr(self, f"{self.mixer_name}_norm"))

    @property
    def _parts(self) -> tuple[Any, Any, Any]:
        return self.mixer_norm, getattr(self, "ffn", None), getattr(self, "ffn_norm", None)

    def forward(self, x: Tensor, state: Any, layout: Layout) -> tuple[Tensor, Any]:
        """x and the mixer's state after these tokens, going on from `state`, which stays."""
        mixer = self.mixer
        return self.residual(x, lambda h: mixer(h, state, layout), *self._parts)

    def step(self, x: Tensor, state: Any, layout: Layout) -> tuple[Tensor, Any]:
        """One token a row, x `[B,D]`; `state` may be updated in place."""
        mixer = self.mixer
        return self.residual(x, lambda h: mixer.step(h, state, layout), *self._parts)

    def emit(self, program: Any, x: Any, state: Any) -> Any:
        """Writes the instructions of a step that updates `state`; gives the rows of x after it."""
        norm, ffn, ffn_norm = self._parts
        after, _ = self.residual.forward(
            x,
            lambda h: (self.mixer.emit(program, h, state), state),
            lambda h: program.norm(h, norm, h.size),
            lambda h: ffn.emit(program, h),
            lambda h: program.norm(h, ffn_norm, h.size),
        )
        return after

    def init_weights(self, config: ModelConfig, generator: torch.Generator | None) -> None:
        """Values of the mixer's and the FFN's weights, by `config.initialization`."""
        parts = [self.mixer, self.ffn] if hasattr(self, "ffn") else [self.mixer]
        for part in parts:
            part.init_weights(config.initialization, config.num_hidden_layers, generator)
