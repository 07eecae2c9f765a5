"""`make` on a newcomer's machine: what it says and leaves behind when the set-up goes wrong.

A small shell script stands for python: the real one answers its questions about the language, and
`venv` and `pip` do what the test wants of them.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PYTHON = """#!/bin/sh
case "$*" in
*--version*) echo "Python {version}" ;;
*version_info*) exit {wrong_version} ;;
*"import venv"*) exit {no_venv} ;;
"-m venv"*) echo made >>made; mkdir -p .venv/bin; cp pip.sh .venv/bin/python ;;
*) exec {real} "$@" ;;
esac
"""

PIP = """#!/bin/sh
case "$*" in
*--version*) ;;
*) echo "$*" >>installed; {behaviour} ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "scripts"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    script(tmp_path / "pip.sh", PIP.format(behaviour="true"))
    python(tmp_path)
    return tmp_path


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def python(folder: Path, version: str = "3.11.7", wrong_version: int = 0, no_venv: int = 0) -> None:
    answers = {"version": version, "wrong_version": wrong_version, "no_venv": no_venv}
    script(folder / "python", PYTHON.format(real=sys.executable, **answers))


def set_up(folder: Path, python: str = "./python") -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C"}  # not as the child of another make
    command = ["make", ".venv/ready", f"PY={python}"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def complaint(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of ours; make adds its own `*** Error 1`."""
    assert result.returncode == 2
    ours, makes_own = result.stderr.splitlines()
    assert makes_own.startswith("make: ***")
    return ours


def test_a_second_make_has_nothing_to_do(checkout: Path):
    assert set_up(checkout).returncode == 0
    torch_alone, the_rest = (checkout / "installed").read_text().splitlines()
    assert torch_alone.endswith("-c constraints.txt torch>=2.11")
    assert the_rest.endswith("-c constraints.txt -e .[dev,eval,export,hf]")
    again = set_up(checkout)
    assert again.returncode == 0
    assert "up to date" in again.stdout


def test_changed_requirements_bring_the_environment_up_to_date(checkout: Path):
    set_up(checkout)
    newer = (checkout / ".venv/ready").stat().st_mtime + 10
    os.utime(checkout / "constraints.txt", (newer, newer))
    assert set_up(checkout).returncode == 0
    assert len((checkout / "installed").read_text().splitlines()) == 4
    assert (checkout / "made").read_text() == "made\n"


@pytest.mark.parametrize("version", ["2.7.18", "3.10.13", "3.14.0"])
def test_a_wrong_python(checkout: Path, version: str):
    python(checkout, version, wrong_version=1)
    line = complaint(set_up(checkout))
    assert f"Python {version}" in line and "3.11, 3.12 or 3.13" in line and "make PY=" in line
    assert not (checkout / ".venv").exists()


def test_no_python_at_all(checkout: Path):
    assert "install Python 3.11" in complaint(set_up(checkout, "no-such-python"))


def test_a_python_without_venv(checkout: Path):
    python(checkout, no_venv=1)
    assert "apt install python3-venv" in complaint(set_up(checkout))


@pytest.mark.parametrize(
    ("pips_words", "line"),
    [
        ("Retrying after connection broken by NewConnectionError: Temporary failure", "no network"),
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: No matching distribution found for torch", "No matching distribution"),
    ],
)
def test_a_failing_pip_leaves_nothing_that_is_taken_as_ready(
    checkout: Path, pips_words: str, line: str
):
    script(checkout / "pip.sh", PIP.format(behaviour=f"echo '{pips_words}'; exit 1"))
    assert line in complaint(set_up(checkout))
    assert not (checkout / ".venv/ready").exists()
    script(checkout / "pip.sh", PIP.format(behaviour="true"))
    assert set_up(checkout).returncode == 0
    assert (checkout / "made").read_text() == "made\n" * 2  # not the half-made one


def test_a_disk_that_fills_up_as_the_environment_is_made(checkout: Path):
    words = "echo 'Error: [Errno 28] No space left on device'; exit 1 ;;"
    before = (checkout / "python").read_text()
    script(checkout / "python", before.replace("echo made >>made; mkdir", f"{words}\nnever) mkdir"))
    assert "disk is full" in complaint(set_up(checkout))
    script(
        checkout / "python", before.replace("echo made >>made; mkdir", "exit 1 ;;\nnever) mkdir")
    )
    assert "apt install python3-venv" in complaint(set_up(checkout))


def test_an_update_that_is_cut_short_is_not_ready(checkout: Path):
    set_up(checkout)
    (checkout / ".venv/ready").rename(checkout / ".venv/unfinished")
    assert set_up(checkout).returncode == 0
    assert (checkout / "made").read_text() == "made\n" * 2


def test_the_requirement_for_torch_is_written_once_with_one_meaning():
    assert '"torch>=2.11"' in (ROOT / "pyproject.toml").read_text()
    assert '"torch>=2.11"' in (ROOT / "scripts/environment.sh").read_text()
