"""Commands open anybody's checkpoint, as `retentive.load` does."""

import shutil
from pathlib import Path

import pytest
import torch

import retentive
from retentive.cli import main
from retentive.convert.loading import load_config
from retentive.data.tokenizer import byte_tokenizer, save_tokenizer

GOLDEN = Path(__file__).parent / "golden"
FOREIGN = ("D1_torchscale_deepnorm", "D4_syncdoth_v2_tied", "D6_fla_hybrid")


@pytest.fixture(params=FOREIGN)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Without the tensors of the original's output."""
    out = tmp_path / request.param
    out.mkdir()
    for file in (GOLDEN / request.param).iterdir():
        if file.name not in ("golden.safetensors", "meta.json"):
            shutil.copy(file, out)
    return out


def test_its_config_is_that_of_its_model(folder):
    assert load_config(folder) == retentive.load(folder).config


def test_info_and_quantize(folder, tmp_path, capsys):
    assert main(["info", str(folder)]) == 0
    assert "retention" in capsys.readouterr().out
    assert main(["quantize", str(folder), str(tmp_path / "small"), "--to", "int8"]) == 0
    logits, _ = retentive.load(tmp_path / "small")(torch.tensor([[1, 2, 3]]))
    assert torch.isfinite(logits).all()


def test_generate_needs_its_tokenizer_and_says_so(folder, capsys):
    assert main(["generate", str(folder), "--prompt", "a"]) == 2
    said = capsys.readouterr().err
    assert "holds no tokenizer" in said and said.count("\n") == 1


def test_generate_with_its_tokenizer(folder):
    save_tokenizer(byte_tokenizer(), folder)
    assert main(["generate", str(folder), "--prompt", "a", "--max-new-tokens", "2"]) == 0
