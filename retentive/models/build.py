"""From a config to its model."""

from functools import lru_cache

import torch

from retentive.models.config import ModelConfig, RetNetConfig, TransformerConfig
from retentive.models.language_model import LanguageModel
from retentive.models.retnet import RetNet
from retentive.models.transformer import Transformer

_NAMED: dict[type[ModelConfig], type[LanguageModel]] = {
    RetNetConfig: RetNet,
    TransformerConfig: Transformer,
}


def build_model(config: ModelConfig) -> LanguageModel:
    """The model of a config, on the default device; its weights are initialized."""
    return _NAMED.get(type(config), LanguageModel)(config)


def empty_model(config: ModelConfig) -> LanguageModel:
    """On the meta device: shapes, and no values."""
    with torch.device("meta"):
        return build_model(config)


@lru_cache(maxsize=64)
def shapes(config: ModelConfig) -> LanguageModel:
    """`empty_model`, kept to be asked about sizes: leave it as it is."""
    return empty_model(config)
