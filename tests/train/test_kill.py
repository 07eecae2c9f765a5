"""`kill -9` at every moment of a run, also while it saves."""

import os
import subprocess
import sys
from pathlib import Path

import zoo

from retentive.models.checkpoint import save_model
from retentive.models.retnet import RetNet


def killed_runs(*arguments: Path) -> int:
    script = Path(__file__).with_name("killed.py")
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": ".", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_killed_run_resumes_to_the_same_weights(texts: Path, tmp_path: Path):
    assert killed_runs(tmp_path, texts) > 30


def test_a_killed_state_tuning_resumes_to_the_same_states(texts: Path, tmp_path: Path):
    sizes = {"vocab_size": 257, "hidden_size": 8, "num_hidden_layers": 1, "num_heads": 2}
    save_model(RetNet(zoo.retnet(**sizes, dropout=0.1)), tmp_path / "base")
    (tmp_path / "work").mkdir()
    assert killed_runs(tmp_path / "work", texts, tmp_path / "base") > 3
