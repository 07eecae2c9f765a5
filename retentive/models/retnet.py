"""RetNet: a language model whose layers mix tokens by multi-scale retention (paper §2)."""

from retentive.models.config import RetNetConfig
from retentive.models.language_model import LanguageModel


class RetNet(LanguageModel):
    """See `LanguageModel` for the calls. In a hybrid some layers are attention layers."""

    config: RetNetConfig
