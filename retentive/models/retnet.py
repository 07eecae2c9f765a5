"""RetNet: a language model whose layers mix tokens by multi-scale retention (paper §2)."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from retentive.models.config import RetNetConfig
from retentive.models.language_model import LanguageModel
from retentive.models.layers import MultiScaleRetention, dropout, feed_forward, norm
from retentive.models.layout import Layout
from retentive.models.state import RetentionState


class RetNetBlock(nn.Module):
    """Y = X + MSR(Norm(X)); X' = Y + FFN(Norm(Y))."""

    def __init__(self, config: RetNetConfig):
        super().__init__()
        self.retention_norm = norm(config)
        self.retention = MultiScaleRetention(
            config.hidden_size,
            config.num_heads,
            qk_dim=config.qk_dim,
            value_dim=config.value_dim,
            decay=config.decay,
            rotation=config.rotation,
            rotation_base=config.rotation_base,
            row_scale=config.row_scale,
            gate=config.gate,
            head_norm=config.head_norm,
            head_norm_eps=config.head_norm_eps,
        )
        self.ffn_norm = norm(config)
        self.ffn = feed_forward(config)
        self.dropout = dropout(config)

    def forward(
        self, x: Tensor, state: RetentionState | None, layout: Layout
    ) -> tuple[Tensor, RetentionState | None]:
        before = None if state is None else state.S
        mixed, after = self.retention(self.retention_norm(x), before, layout=layout)
        x = x + self.dropout(mixed)
        x = x + self.dropout(self.ffn(self.ffn_norm(x)))
        return x, None if after is None else RetentionState(after)

    def init_weights(self, config: RetNetConfig, generator: torch.Generator | None) -> None:
        for part in (self.retention, self.ffn):
            part.init_weights(config.initialization, config.num_hidden_layers, generator)


class RetNet(LanguageModel):
    """See `LanguageModel` for the calls."""

    config: RetNetConfig

    def __init__(self, config: RetNetConfig):
        blocks = [RetNetBlock(config) for _ in range(config.num_hidden_layers)]
        super().__init__(config, blocks, blocks[0].retention.rotation)

    def empty_layer_state(self, batch: int, capacity: int | None) -> RetentionState:
        _, *sizes = self.layer_signature
        return RetentionState(
            torch.zeros(batch, *sizes, dtype=self.exact_dtype, device=self.device)
        )

    @property
    def layer_signature(self) -> tuple[Any, ...]:
        config = self.config
        return (RetentionState.kind, config.num_heads, config.qk_head_dim, config.value_head_dim)

    def use(
        self, *, form: str = "auto", backend: str = "auto", chunk_size: int | None = None
    ) -> Self:
        """Choose how every layer computes retention (see `retentive.ops.retention`)."""
        for module in self.modules():
            if isinstance(module, MultiScaleRetention):
                module.form, module.backend, module.chunk_size = form, backend, chunk_size
        return self
