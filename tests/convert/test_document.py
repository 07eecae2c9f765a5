"""docs/checkpoints.md: its commands and its Python are run, in order, in a folder of their own."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from retentive.cli import main
from retentive.models.checkpoint import load_config

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "checkpoints.md").read_text()


@pytest.fixture
def repository(tmp_path, monkeypatch, golden):
    """A folder that looks like the repository from inside, and a Hub with one checkpoint."""

    class Hub:
        @staticmethod
        def snapshot_download(name, allow_patterns):
            assert name == "fla-hub/retnet-1.3B-100B"
            return str(golden / "D6_fla_hybrid")

    for name in ("tests", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    return tmp_path


def test_the_commands_run(repository, capsys):
    lines = [shlex.split(x, comments=True) for x in re.findall(r"^    (.*)$", TEXT, re.MULTILINE)]
    converted = [words[1:] for words in lines if words[0] == "retentive"]
    assert len(converted) == 6
    for words in converted:
        assert main(words) == 0, capsys.readouterr().err
    assert load_config("hybrid") == load_config("hybrid-bf16") == load_config("retnet-1.3b")

    [script] = [words[1:] for words in lines if words[0] == "python"]
    assert script == ["scripts/compare_checkpoints.py", "tests/convert/golden/*"]
    module = runpy.run_path(script[0])
    capsys.readouterr()
    module["main"](["tests/convert/golden/D4_syncdoth_v2_lnemb"])
    header, _, row = capsys.readouterr().out.splitlines()
    assert header in TEXT
    assert row.startswith("| D4_syncdoth_v2_lnemb | ")


def test_the_python_runs(repository):
    [program] = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict = {}
    exec(compile(program, "checkpoints.md", "exec"), names)
    assert names["logits"].shape == (1, 3, 97)


def test_the_table_has_every_checkpoint_of_the_repository(golden):
    for folder in golden.iterdir():
        assert f"| **{folder.name}** |" in TEXT
