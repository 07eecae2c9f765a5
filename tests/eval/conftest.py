import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import zoo
from tokenizers import Tokenizer

from retentive.data.tokenizer import save_tokenizer, train_tokenizer
from retentive.models.checkpoint import save_model
from retentive.models.config import AttentionConfig
from retentive.models.language_model import LanguageModel
from retentive.models.retnet import RetNet
from retentive.models.transformer import Transformer

WORDS = (
    "the retentive network reads a token and keeps a state of it that never grows at all".split()
)
HYBRID = {"attention_layers": (1,), "attention": AttentionConfig(num_heads=2, window=7)}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2}


def text(words: int, skip: int = 3) -> str:
    """`words` words without end of a repeating pattern."""
    return " ".join(WORDS[(n * skip + n // 5) % len(WORDS)] for n in range(words))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Byte-level BPE with a few merges: contexts and continuations tokenize as one text."""
    return train_tokenizer([text(2000)], 320)


def build(kind: str, vocab_size: int) -> LanguageModel:
    if kind == "transformer":
        model = Transformer(zoo.transformer(vocab_size=vocab_size, **SMALL, num_kv_heads=1))
    else:
        others = HYBRID if kind == "hybrid" else {}
        model = RetNet(zoo.retnet(vocab_size=vocab_size, **SMALL, **others))
    model.init_weights(seed=0)
    return model.double().eval()


@pytest.fixture(scope="session", params=["retnet", "hybrid", "transformer"])
def model(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> LanguageModel:
    """In float64."""
    return build(request.param, tokenizer.get_vocab_size())


@pytest.fixture(scope="session")
def retnet(tokenizer: Tokenizer) -> LanguageModel:
    return build("retnet", tokenizer.get_vocab_size())


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the model folder runs/demo in it, a RetNet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")  # as the command does, for good
    return write_model(Path("runs/demo"), "retnet", tokenizer)


def write_model(path: Path, kind: str, tokenizer: Tokenizer) -> Path:
    save_model(build(kind, tokenizer.get_vocab_size()).float(), path)
    save_tokenizer(tokenizer, path)
    return path


@pytest.fixture(scope="package")
def lm_eval_offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test here reaches a network, or the user's cache of data sets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_DISABLE", "1")
        patch.setenv("DISABLE_MULTIPROC", "1")
        import datasets
        import huggingface_hub.constants

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield


def report(name: str, out: Path = Path("runs/eval/demo")) -> dict:
    return json.loads((out / f"{name}.json").read_text())
