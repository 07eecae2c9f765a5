"""`retentive merge` and `retentive generate --adapter`."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from retentive.adapters.loading import load_adapted
from retentive.cli import main
from retentive.models.checkpoint import load

SETTINGS = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json")
PROMPT = ["--prompt", "abc", "--temperature", "0", "--max-new-tokens", "30"]


@pytest.fixture
def run(capfd):
    """Runs a command; its exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return call


@torch.no_grad()
def test_merge_writes_a_model_folder(
    run, base: Path, lora: Path, tmp_path: Path, tokens: Tensor
) -> None:
    base = shutil.copytree(base, tmp_path / "base")
    for name in SETTINGS:
        (base / name).write_text("{}")
    code, out, _ = run("merge", base, lora, tmp_path / "merged")
    assert (code, out) == (
        0,
        f"wrote {tmp_path / 'merged'}: {base} with {lora} merged into its weights\n",
    )
    merged = load(tmp_path / "merged")
    assert torch.equal(merged(tokens)[0], load_adapted(base, lora)(tokens)[0])
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", *SETTINGS}
    assert run("merge", base, lora, tmp_path / "half", "--dtype", "bfloat16")[0] == 0
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("merged", "half")]
    assert sizes[1] < 0.6 * sizes[0]


def test_generate_with_lora_is_generate_from_the_merged_model(
    run, base: Path, lora: Path, tmp_path: Path
) -> None:
    code, text, _ = run("generate", base, "--adapter", lora, *PROMPT)
    assert code == 0
    run("merge", base, lora, tmp_path / "merged")
    assert (
        text
        == run("generate", tmp_path / "merged", *PROMPT)[1]
        != run("generate", base, *PROMPT)[1]
    )


@pytest.mark.parametrize("kind", ["lora", "state"])
def test_a_saved_text_goes_on_with_its_adapter(
    run, base: Path, lora: Path, state: Path, tmp_path: Path, kind: str
) -> None:
    adapted = ["generate", base, "--adapter", lora if kind == "lora" else state]
    whole = run(*adapted, *PROMPT)[1]
    assert whole != run("generate", base, *PROMPT)[1]
    saved = tmp_path / "saved"
    _, first, err = run(*adapted, *PROMPT[:-1], 12, "--save-state", saved)
    assert f"--adapter {adapted[3]} --load-state {saved}" in err
    assert first + run(*adapted, "--load-state", saved, "--max-new-tokens", 18)[1] == whole
    code, _, err = run("generate", base, "--load-state", saved)
    assert (code, err.count("\n")) == (2, 1)
    assert "of another model or other weights" in err


def test_mistakes_are_one_line(run, base: Path, lora: Path, state: Path, tmp_path: Path) -> None:
    for arguments, line in [
        (["merge", base, state, tmp_path / "out"], "holds a tuned state, which is no part of the"),
        (["merge", base, lora, base], "exists already"),
        (["merge", base, tmp_path / "none", tmp_path / "out"], "there is no adapter folder"),
        (["merge", lora, lora, tmp_path / "out"], "is an adapter; give the model"),
        (["merge", base, lora, tmp_path / "out", "--dtype", "int3"], "unknown dtype"),
        (["generate", base, "--adapter", base, *PROMPT], "is a model, no adapter"),
        (["generate", lora, *PROMPT], "is an adapter; give the model it was trained on, and --"),
    ]:
        code, out, err = run(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert line in err
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer_is_told(run, base: Path, lora: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer.json"))
    code, out, _ = run("merge", bare, lora, tmp_path / "merged")
    assert code == 0
    assert f"{bare} holds no tokenizer.json: none is in {tmp_path / 'merged'}\n" in out
