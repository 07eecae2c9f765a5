"""A corpus and a run that take a fraction of a second."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retentive.train.config import RunConfig

WORDS = "the state of a retention network decays and never grows with what it has read".split()


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 30 documents of different lengths, about 9 kB."""
    folder = tmp_path_factory.mktemp("texts")
    for n in range(30):
        words = (WORDS[(n * i + i * i) % len(WORDS)] for i in range(5 + 4 * n))
        (folder / f"{n}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture
def table(texts: Path) -> dict[str, Any]:
    """The tables of a tiny run's TOML file, to change at will."""
    return {
        "model": {"hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2, "dropout": 0.1},
        "data": {"sources": [str(texts)], "tokenizer": "bytes", "valid_fraction": 0.2},
        "optimizer": {"lr": 1e-2, "warmup": 2},
        "train": {
            "steps": 6,
            "batch_size": 4,
            "seq_len": 32,
            "save_every": 2,
            "valid_every": 0,
            "valid_tokens": 500,
            "sample_every": 0,
            "sample_tokens": 4,
            "device": "cpu",
        },
    }


@pytest.fixture
def tiny(table: dict[str, Any]) -> Callable[..., RunConfig]:
    """`tiny(train={"steps": 3})`: the tiny run with some keys changed."""

    def make(**changes: dict[str, Any]) -> RunConfig:
        return RunConfig.from_table({s: table[s] | changes.get(s, {}) for s in table})

    return make


@pytest.fixture(autouse=True)
def nothing_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a fraction of a second spend none on the machine's GEMM rate or on curves."""
    monkeypatch.setattr("retentive.train.loop.measure_gemm_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr("retentive.train.loop.plot_curve", lambda records, path: None)
