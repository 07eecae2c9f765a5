"""Small models, the folders that this package writes of them, and these opened by transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zoo
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import retentive.hf as hf
from retentive.data.tokenizer import byte_tokenizer, save_tokenizer
from retentive.mixers.attention import AttentionConfig
from retentive.models.build import build_model
from retentive.models.checkpoint import load, save_model
from retentive.models.language_model import LanguageModel

SMALL = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4}
CONFIGS = {
    "retnet": zoo.retnet(**SMALL),
    "retnet-tied": zoo.retnet(
        **SMALL,
        gated_ffn=True,
        norm="rmsnorm",
        head_norm="rmsnorm",
        decay=(-0.5, -0.1, -0.01, 0.0),
        row_scale=True,
        tie_word_embeddings=True,
    ),
    "hybrid": zoo.retnet(
        **SMALL,
        block="parallel",
        embed_scale=2.0,
        embed_norm=True,
        qkv_bias=True,
        head_bias=True,
        attention_layers=(1,),
        attention=AttentionConfig(num_heads=2, window=5),
    ),
    "transformer": zoo.transformer(**SMALL, num_kv_heads=2),
}

logging.disable_progress_bar()


def build(name: str) -> LanguageModel:
    config = CONFIGS[name]
    model = build_model(config)
    model.init_weights(seed=0)
    with torch.no_grad():  # what is read shall matter: at first blocks add little to the stream
        model.embed_tokens.weight.mul_(0.3)
    return model.eval()


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[[str], Path]:
    """A model folder as a training run writes it, of the model of that name."""

    def make(name: str) -> Path:
        save_model(build(name), tmp_path / name)
        save_tokenizer(byte_tokenizer(), tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture(params=CONFIGS)
def folder(request: pytest.FixtureRequest, make_folder: Callable[[str], Path]) -> Path:
    return make_folder(request.param)


@pytest.fixture
def ours(folder: Path) -> LanguageModel:
    """In float64: what must be equal is then equal to about 1e-14."""
    return load(folder, dtype="float64")


@pytest.fixture
def theirs(folder: Path) -> hf.RetentiveForCausalLM:
    """The same model, opened by transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, 257, (3, 12), generator=torch.manual_seed(1))
