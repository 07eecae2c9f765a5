"""RetNet: a language model whose layers mix tokens by multi-scale retention (paper §2)."""

from typing import Any, Self

import torch
from torch import Tensor

from retentive.layers.layout import Layout, Rotation
from retentive.mixers.attention import AttentionBlock
from retentive.mixers.retention import FeedForward, MultiScaleRetention, norm, rotation
from retentive.models.block import JOINS, Block, Kept, Mixer
from retentive.models.config import RetNetConfig
from retentive.models.language_model import LanguageModel
from retentive.models.state import RetentionState


class RetNetBlock(Block):
    """Y = X + MSR(Norm(X)); X' = Y + FFN(Norm(Y)). Other ways to join the two: `block.JOINS`."""

    def __init__(self, config: RetNetConfig):
        super().__init__()
        self.retention_norm = norm(config)
        self.retention = MultiScaleRetention.of(config)
        self.ffn_norm = norm(config)
        self.ffn = FeedForward(config)
        self.join = JOINS[config.block](config)

    def forward(
        self, x: Tensor, state: RetentionState | None, layout: Layout
    ) -> tuple[Tensor, RetentionState | None]:
        before = None if state is None else state.S
        x, after = self.around(x, lambda h: self.retention(h, before, layout=layout))
        return x, None if after is None else RetentionState(after)

    def around(self, x: Tensor, mix: Mixer[Kept]) -> tuple[Tensor, Kept]:
        """x through the block, with `mix` in the place of its retention."""
        return self.join(x, mix, self.retention_norm, self.ffn, self.ffn_norm)

    def init_weights(self, config: RetNetConfig, generator: torch.Generator | None) -> None:
        for part in (self.retention, self.ffn):
            part.init_weights(config.initialization, config.num_hidden_layers, generator)

    def empty_state(self, batch: int, capacity: int | None, like: Tensor) -> RetentionState:
        exact = torch.promote_types(like.dtype, torch.float32)
        if (tuned := self.retention.initial_state) is not None:
            return RetentionState(tuned.to(exact).repeat(batch, 1, 1, 1))
        _, *sizes = self.state_signature
        return RetentionState(torch.zeros(batch, *sizes, dtype=exact, device=like.device))

    @property
    def state_signature(self) -> tuple[Any, ...]:
        return (RetentionState.kind, *self.retention.state_shape)


class RetNet(LanguageModel):
    """See `LanguageModel` for the calls. In a hybrid some layers are attention layers."""

    config: RetNetConfig

    def __init__(self, config: RetNetConfig):
        blocks = [
            RetNetBlock(config)
            if config.attention is None or index not in config.attention_layers
            else AttentionBlock(config, config.attention)
            for index in range(config.num_hidden_layers)
        ]
        of_attention = None
        if (attention := config.attention) is not None:
            head_dim = config.hidden_size // attention.num_heads
            of_attention = Rotation(head_dim, "rope", attention.rope_theta)
        super().__init__(config, blocks, rotation(config), of_attention)

    def use(
        self, *, form: str = "auto", backend: str = "auto", chunk_size: int | None = None
    ) -> Self:
        """Choose how every layer computes retention (see `retentive.ops.retention`)."""
        for module in self.modules():
            if isinstance(module, MultiScaleRetention):
                module.form, module.backend, module.chunk_size = form, backend, chunk_size
        return self
