"""The baseline: a pre-norm Transformer with rotary positions and a cache of keys and values."""

from retentive.layers.layout import Rotation
from retentive.mixers.attention import AttentionBlock
from retentive.models.config import TransformerConfig
from retentive.models.language_model import LanguageModel
from retentive.models.nested import AttentionConfig


class Transformer(LanguageModel):
    """See `LanguageModel` for the calls."""

    config: TransformerConfig

    def __init__(self, config: TransformerConfig):
        attention = AttentionConfig(config.num_heads, config.kv_heads)
        blocks = [AttentionBlock(config, attention) for _ in range(config.num_hidden_layers)]
        super().__init__(config, blocks, Rotation(config.head_dim, "rope", config.rope_theta))
