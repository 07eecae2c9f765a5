"""`kill -9` at every moment of a run, also while it saves."""

import os
import subprocess
import sys
from pathlib import Path


def test_a_killed_run_resumes_to_the_same_weights(texts: Path, tmp_path: Path):
    script = Path(__file__).with_name("killed.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(texts)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": ".", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30
