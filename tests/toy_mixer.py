"""A mixer of one's own, registered by one line: a gated exponential moving average.

h_t = a ⊙ h_{t-1} + (1 - a) ⊙ x_t W_in,  y_t = (h_t ⊙ swish(x_t W_gate)) W_out,  a = sigmoid(α)
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retentive.layers.linear import Linear
from retentive.mixers.base import Mixer, MixerConfig
from retentive.mixers.state import TensorState


@dataclass(frozen=True)
class EMAConfig(MixerConfig):
    """expand: the channels of the average over the model's width."""

    kind: ClassVar[str] = "ema"

    expand: int = 1


class EMA(Mixer):
    name = "ema"
    Config = EMAConfig

    def __init__(self, hidden_size: int, config: EMAConfig):
        super().__init__(hidden_size, config)
        inner = config.expand * hidden_size
        self.in_proj = Linear(hidden_size, inner)
        self.gate_proj = Linear(hidden_size, inner)
        self.out_proj = Linear(inner, hidden_size)
        self.alpha = nn.Parameter(torch.empty(inner))

    def forward(self, x, state, layout):
        return self.sequence_by_sequence(x, state, layout, self.run)

    def run(self, x: Tensor, state: TensorState) -> tuple[Tensor, TensorState]:
        h, log_a, outputs = state["h"], F.logsigmoid(self.alpha), []
        for u in self.in_proj(x).split(32, 1):  # [B,T,E] in pieces: memory grows with T, not T²
            steps = torch.arange(1.0, u.shape[1] + 1, dtype=h.dtype, device=x.device)[:, None]
            apart = steps - steps.T
            powers = (apart.clamp(min=0)[..., None] * log_a).exp()  # a^(t-s), [T,S,E]
            weights = torch.where(apart[..., None] < 0, 0, powers * (1 - log_a.exp()))
            out = torch.einsum("tse,bse->bte", weights, u.to(h.dtype))
            out = out + (steps * log_a).exp() * h[:, None]
            h = out[:, -1]
            outputs.append(out)
        y = torch.cat(outputs, 1).to(x.dtype) * F.silu(self.gate_proj(x))
        return self.out_proj(y), TensorState(self.name, {"h": h})

    def empty_state(self, rows: int, like: Tensor, capacity: int = 0) -> TensorState:
        exact = torch.promote_types(like.dtype, torch.float32)
        h = torch.zeros(rows, len(self.alpha), dtype=exact, device=like.device)
        return TensorState(self.name, {"h": h})

    def init_weights(self, initialization, depth, generator=None) -> None:
        for projection in (self.in_proj, self.gate_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight, generator=generator)
        nn.init.uniform_(self.alpha, 1.0, 4.0, generator=generator)
