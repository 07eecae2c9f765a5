"""docs/finetuning.md does what it says: its commands one after the other, its program."""

import re
import shlex
from pathlib import Path

import pytest

from retentive.adapters.loading import load_adapted
from retentive.cli import main
from retentive.models.checkpoint import load

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "finetuning.md").read_text()
SHORT = ["--train.steps", "2", "--train.seq-len", "32", "--train.sample-tokens", "2"]


@pytest.mark.filterwarnings(  # PEFT asks the newest transformers by an old name
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
def test_its_commands_and_its_program_run(base: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("retentive.train.loop.measure_gemm_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr("retentive.train.loop.plot_curve", lambda records, path: None)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(base)
    (tmp_path / "texts").mkdir()
    for n in range(20):
        (tmp_path / "texts" / f"{n}.txt").write_text(f"text {n} " * 20)
    lines = re.findall(r"^    retentive (.*)$", DOCUMENT, re.MULTILINE)
    for line in lines:
        words = shlex.split(line, comments=True)
        assert main([*words, *(SHORT if words[0] == "train" else [])]) == 0, line
    for folder in ("runs/finetune", "runs/state"):
        load_adapted("runs/demo", folder)
    for folder in ("runs/full", "runs/merged", "runs/merged-int8"):
        load(folder)
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    exec(compile("\n".join(blocks), "finetuning.md", "exec"), {})
