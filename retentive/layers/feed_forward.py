"""The feed-forward network of a block. Shapes: B rows, T tokens, D width; x `[B,T,D]`."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import init

from retentive.fields import check_positive, check_types
from retentive.layers.activations import ACTIVATIONS, Activation
from retentive.layers.linear import Linear
from retentive.layers.parts import OptionalNorm, Recomputing, deepnet_gain, make_norm


@dataclass(frozen=True)
class FeedForwardConfig:
    """The FFN of every block.

    intermediate_size   its width; by the mixer unless given, a gated one's with as many parameters
    act                 the activation
    gated               (act(X W_gate) ⊙ X W_up) W_down in place of act(X W_up) W_down
    bias                of the projections
    subln               a norm before the last projection (`layers.N.ffn.subln`)
    """

    intermediate_size: int | None = None
    act: Activation = "gelu"
    gated: bool = False
    bias: bool = False
    subln: OptionalNorm = "none"

    def __post_init__(self) -> None:
        check_types(self, "ffn.")

    def for_width(self, hidden_size: int, ratio: float) -> Self:
        """With the width filled in: `ratio` times the model's, of a gated one 2/3 of that."""
        size = self.intermediate_size
        if size is None:
            size = int(ratio * hidden_size)
            size = 8 * max(1, round(2 * ratio * hidden_size / 3 / 8)) if self.gated else size
        check_positive("intermediate_size", size)
        return dataclasses.replace(self, intermediate_size=size)


class FeedForward(Recomputing):
    """FFN(X) = act(X W_up) W_down, or gated: (act(X W_gate) ⊙ X W_up) W_down.

    With a `subln` the input of W_down is normed.
    """

    def __init__(self, hidden_size: int, config: FeedForwardConfig, norm_eps: float):
        super().__init__()
        inner, bias = config.intermediate_size, config.bias
        assert inner is not None
        self.act: Callable[[Tensor], Tensor] = ACTIVATIONS[config.act]
        self.gate_proj = Linear(hidden_size, inner, bias) if config.gated else None
        self.up_proj = Linear(hidden_size, inner, bias)
        self.subln = make_norm(config.subln, inner, norm_eps)
        self.down_proj = Linear(inner, hidden_size, bias)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.up_proj(x), None if self.gate_proj is None else self.gate_proj(x)
        return self.recomputed(self._output, up, gate)

    def _output(self, up: Tensor, gate: Tensor | None) -> Tensor:
        inner = self.act(up) if gate is None else self.act(gate) * up
        return self.down_proj(self.subln(inner))

    def emit(self, program: Any, x: Any) -> Any:
        """Writes the instructions of a decode program; gives the rows of the output."""
        up, act = program.product(x, self.up_proj), self._act_name()
        assert act is not None
        if self.gate_proj is None:
            inner = program.gate(act, up)
        else:
            inner = program.gate(act, program.product(x, self.gate_proj), up)
        return program.product(program.norm(inner, self.subln, inner.size), self.down_proj)

    def emits(self) -> bool:
        """Whether `emit` knows the activation: a user may have put another in its place."""
        return self._act_name() is not None

    def _act_name(self) -> str | None:
        return next((name for name, act in ACTIVATIONS.items() if act is self.act), None)

    def init_weights(
        self, initialization: str, depth: int, generator: torch.Generator | None = None
    ) -> None:
        """As a mixer's; the authors' code has torch's own values for linear layers here."""
        for projection in (self.gate_proj, self.up_proj, self.down_proj):
            if projection is None:
                continue
            if initialization == "official":
                bound = projection.in_features**-0.5
                init.uniform_(projection.weight, -bound, bound, generator)
            else:
                init.xavier_normal_(projection.weight, deepnet_gain(depth), generator)
