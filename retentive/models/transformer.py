"""The baseline: a pre-norm Transformer with rotary positions and a cache of keys and values."""

from retentive.models.config import TransformerConfig
from retentive.models.language_model import LanguageModel


class Transformer(LanguageModel):
    """See `LanguageModel` for the calls."""

    config: TransformerConfig
