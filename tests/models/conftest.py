"""Small models of every kind, in float64: what must be equal is then equal to about 1e-14."""

import pytest
import torch

from retentive.models.config import RetNetConfig, TransformerConfig
from retentive.models.language_model import LanguageModel
from retentive.models.retnet import RetNet
from retentive.models.transformer import Transformer

SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4}
CONFIGS = {
    "retnet": RetNetConfig(**SMALL),
    "retnet-official": RetNetConfig(
        **SMALL,
        gated_ffn=True,
        hidden_act="swish",
        norm="rmsnorm",
        head_norm="rmsnorm",
        decay="linspace",
        rotation="rope",
        row_scale=True,
        tie_word_embeddings=True,
        initialization="official",
    ),
    "retnet-ablated": RetNetConfig(
        **SMALL, gate=False, head_norm="none", decay=(0.0, 0.0, -0.1, -0.1), row_scale=True
    ),
    "transformer": TransformerConfig(**SMALL),
    "transformer-gqa": TransformerConfig(**SMALL, num_kv_heads=2, gated_ffn=True),
}


def build(name: str, **changes: object) -> LanguageModel:
    config = CONFIGS[name]
    config = type(config).from_dict({**config.to_dict(), **changes})
    model = RetNet(config) if isinstance(config, RetNetConfig) else Transformer(config)
    model.init_weights(seed=0)
    return model.double()


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return build(request.param)


@pytest.fixture(params=["retnet", "retnet-official", "retnet-ablated"])
def retnet(request: pytest.FixtureRequest) -> LanguageModel:
    return build(request.param)


@pytest.fixture(params=["transformer", "transformer-gqa"])
def transformer(request: pytest.FixtureRequest) -> LanguageModel:
    return build(request.param)


@pytest.fixture
def make_model():
    """`build`, for tests that change a config."""
    return build


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, SMALL["vocab_size"], (3, 11), generator=torch.manual_seed(1))
