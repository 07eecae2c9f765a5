"""`make` on a newcomer's machine: what it says and leaves behind when the set-up goes wrong.

A small shell script stands for python: the real one answers its questions about the language, and
`venv` and `pip` do what the test wants of them.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "requirements.lock").read_text().splitlines()

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
    for name in ("Makefile", "pyproject.toml", "requirements.lock", "scripts"):
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
    torch_alone, build_tools, the_lock = (checkout / "installed").read_text().splitlines()
    assert torch_alone.endswith("-c requirements.lock torch")
    assert build_tools.endswith("-c requirements.lock hatchling editables setuptools")
    assert the_lock.endswith("--no-deps --no-build-isolation -r requirements.lock -e .")
    again = set_up(checkout)
    assert again.returncode == 0
    assert "up to date" in again.stdout


def test_changed_requirements_bring_the_environment_up_to_date(checkout: Path):
    set_up(checkout)
    newer = (checkout / ".venv/ready").stat().st_mtime + 10
    os.utime(checkout / "requirements.lock", (newer, newer))
    assert set_up(checkout).returncode == 0
    assert len((checkout / "installed").read_text().splitlines()) == 2 * 3
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


def test_the_newest_versions_go_to_an_environment_of_their_own(checkout: Path):
    command = ["sh", "scripts/environment.sh", "./python", ".venv-newest", "torch<2.14"]
    fake = (checkout / "python").read_text()
    script(checkout / "python", fake.replace(".venv/", ".venv-newest/"))
    subprocess.run(command, cwd=checkout, check=True, capture_output=True)
    torch_alone, the_rest = (checkout / "installed").read_text().splitlines()
    assert torch_alone.endswith("install --disable-pip-version-check torch<2.14")
    assert the_rest.endswith("--upgrade-strategy eager torch<2.14 -e .[dev,eval,export,hf]")
    assert not (checkout / ".venv").exists()


def test_the_lock_answers_every_requirement_of_pyproject_within_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lists = [project["dependencies"], *(extras[e] for e in ("dev", "eval", "export", "hf"))]
    pins = [Requirement(line) for line in LOCK if not line.startswith("#")]
    versions = {pin.name: next(iter(pin.specifier)).version for pin in pins}
    for requirement in map(Requirement, chain(*lists)):
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}, locked at {version}"


def test_the_lock_holds_versions_and_markers_only_and_nothing_of_cuda():
    for line in LOCK[1:]:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9a-z.]+( ; [a-z_]+ .*)?", line), line
        assert not line.startswith(("nvidia-", "cuda-"))


def test_renewing_the_lock_says_what_changed(tmp_path: Path):
    (tmp_path / "old").write_text("# a lock\ngone==1\nnumpy==2.4.6 ; python_version < '3.12'\n")
    (tmp_path / "new").write_text("came==3\nNumPy==2.5.5\n-e /some/where\n")
    versions = [sys.executable, ROOT / "scripts/versions.py"]
    said = subprocess.check_output([*versions, tmp_path / "old", tmp_path / "new"], text=True)
    assert said == "came (none) -> 3\ngone 1 -> (none)\nnumpy 2.4.6 -> 2.5.5\n"
    said = subprocess.check_output([*versions, tmp_path / "old", tmp_path / "old"], text=True)
    assert said == "no version changed\n"


def test_in_a_run_on_the_newest_versions_only_warnings_of_our_own_are_errors(tmp_path: Path):
    (only,) = re.findall(r"-o (filterwarnings=\S+)", (ROOT / "Makefile").read_text())
    (tmp_path / "test_it.py").write_text(
        "import warnings\n"
        "def test_theirs():\n"
        "    warnings.warn_explicit('old', FutureWarning, 'f.py', 1, module='torch.nn')\n"
        "def test_ours():\n"
        "    warnings.warn_explicit('slow', UserWarning, 'f.py', 1, module='retentive.ops')\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", only, "test_it.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "FutureWarning: old" in run.stdout
    assert "1 failed, 1 passed, 1 warning" in run.stdout
