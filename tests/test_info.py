"""`retentive info`: the numbers it prints are those of the model, and fit a terminal."""

import pytest
import torch
import zoo

from retentive.cli import main
from retentive.models.checkpoint import save_model
from retentive.models.config import RetNetConfig
from retentive.models.retnet import RetNet
from retentive.models.transformer import Transformer


@pytest.fixture
def info(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def call(name):
        code = main(["info", str(name)])
        out, err = capsys.readouterr()
        assert max((len(line) for line in out.splitlines()), default=0) <= 80
        return code, out, err

    return call


def rows(out):
    """The cells of every table's rows."""
    lines = [line for line in out.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


@pytest.mark.parametrize("size", ["demo", "200m", "1.3b", "2.7b", "6.7b", "13b"])
def test_a_named_size(info, size):
    code, out, _ = info(size)
    with torch.device("meta"):
        model = RetNet(RetNetConfig.named(size))
    assert code == 0
    assert ["all", f"{model.num_parameters():,}", ""] in rows(out)
    assert "MHA" in out and "GQA" in out


def test_what_the_paper_size_needs(info):
    _, out, _ = info("6.7b")
    table = rows(out)
    assert ["0", "0.96875", "21.8"] in table  # log 1/2 / log(1 - 1/32)
    # 32 layers · 16 heads · 256 · 512 · 4 bytes; 32 · 2 · context · 4096 · 2 bytes, and an eighth
    assert ["2,048", "256 MiB", "1 GiB", "128 MiB"] in table
    assert ["131,072", "256 MiB", "64 GiB", "8 GiB"] in table


def test_model_folders(info, tmp_path):
    sizes = {"vocab_size": 300, "hidden_size": 48, "num_hidden_layers": 1, "num_heads": 3}
    retnet = RetNet(zoo.retnet(**sizes, decay=(-0.5, -0.1, 0.0), tie_word_embeddings=True))
    save_model(retnet, tmp_path / "retnet")
    _, out, _ = info(tmp_path / "retnet")
    assert ["head", "tied", "0.0%"] in rows(out)
    assert ["2", "1", "∞"] in rows(out)
    save_model(Transformer(zoo.transformer(**sizes)), tmp_path / "transformer")
    code, out, _ = info(tmp_path / "transformer")
    assert code == 0
    assert ["2,048", "384 KiB"] in rows(out)
    assert "half-life" not in out


def test_a_hybrid(info, tmp_path):
    sizes = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 3, "num_heads": 2}
    attention = {"num_heads": 4, "window": 101}
    hybrid = RetNet(zoo.retnet(**sizes, attention_layers=(1,), attention=attention))
    save_model(hybrid, tmp_path)
    code, out, _ = info(tmp_path)
    assert code == 0
    said = " ".join(out.split())
    assert "in layers 1 (from 0) attention, 4 heads of 16" in said and "a window of 101" in said
    names = [row[0] for row in rows(out)]
    assert "retention" in names and "attention" in names
    assert ["all", f"{hybrid.num_parameters():,}", ""] in rows(out)
    # 2 layers · 2 heads · 32 · 64 · 4 bytes, and 2 · 100 tokens · 64 · 2 bytes, at any length
    assert next(row[1] for row in rows(out) if row[0] == "131,072") == "57 KiB"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("1.2b", "did you mean '1.3b'?"),
        ("./no/such/folder", "no file or folder"),
        (".", "config.json"),
    ],
)
def test_neither_a_folder_nor_a_size(info, name, complaint):
    code, out, err = info(name)
    assert (code, out) == (2, "")
    assert complaint in err
    assert err.count("\n") == 1
