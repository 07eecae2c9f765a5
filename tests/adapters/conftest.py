"""A byte model's folder, and an adapter of each kind for it with random values."""

from pathlib import Path

import pytest
import torch
import zoo

from retentive.adapters.initial_state import InitialState
from retentive.adapters.lora import Lora
from retentive.data.tokenizer import byte_tokenizer, save_tokenizer
from retentive.models.checkpoint import load, save_model
from retentive.models.language_model import LanguageModel
from retentive.models.retnet import RetNet

SIZES = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    model = RetNet(zoo.retnet(**SIZES))
    model.init_weights(seed=0)
    save_model(model, folder)
    save_tokenizer(byte_tokenizer(), folder)
    return folder


@pytest.fixture
def model(base: Path) -> LanguageModel:
    return load(base)


@pytest.fixture
def adapted(base: Path) -> LanguageModel:
    """With LoRA's matrices beside its projections."""
    model = load(base)
    Lora(model, str(base), rank=4, alpha=8, dropout=0.1)
    return randomised(model)


@pytest.fixture
def tuned(base: Path) -> LanguageModel:
    """With a state that texts begin with."""
    model = load(base)
    InitialState(model)
    return randomised(model)


@pytest.fixture
def lora(base: Path, tmp_path: Path) -> Path:
    """The folder of `adapted`'s adapter."""
    return saved(
        Lora(model := load(base), str(base), rank=4, alpha=8, dropout=0.1), model, tmp_path
    )


@pytest.fixture
def state(base: Path, tmp_path: Path) -> Path:
    """The folder of `tuned`'s adapter."""
    return saved(InitialState(model := load(base)), model, tmp_path)


def saved(adapter: Lora | InitialState, model: LanguageModel, folder: Path) -> Path:
    randomised(model)
    folder /= type(adapter).__name__
    folder.mkdir()
    adapter.save(folder)
    return folder


def randomised(model: LanguageModel) -> LanguageModel:
    """What is trained has random values."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], (2, 9), generator=torch.manual_seed(1))
