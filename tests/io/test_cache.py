import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from retentive.io.cache import cache_root, made_once

MAKER = """
import sys, time
from pathlib import Path
from retentive.io.cache import made_once

def make(aside):
    (aside / "a").write_text("half")
    print("making", flush=True)
    sys.stdin.readline()
    (aside / "a").write_text("whole")

made_once(Path(sys.argv[1]), make)
"""


def maker(folder: Path) -> subprocess.Popen[bytes]:
    """A process that makes `folder` and stops halfway until it reads a line."""
    command = [sys.executable, "-c", MAKER, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_a_folder_is_made_once(tmp_path: Path):
    folder = tmp_path / "x" / "y"
    made = []

    def make(aside: Path) -> None:
        made.append(aside)
        assert not folder.exists()
        (aside / "a").write_text("1")

    assert made_once(folder, make) == made_once(folder, make) == folder
    assert len(made) == 1 and not made[0].exists()
    assert (folder / "a").read_text() == "1"


def test_an_error_leaves_nothing_and_the_next_try_succeeds(tmp_path: Path):
    def fail(aside: Path) -> None:
        (aside / "a").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        made_once(tmp_path / "x", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["x.lock"]
    made_once(tmp_path / "x", lambda aside: (aside / "a").touch())
    assert (tmp_path / "x" / "a").exists()


def test_what_a_killed_process_left_is_made_anew(tmp_path: Path):
    process = maker(tmp_path / "x")
    with process:
        assert process.stdout and process.stdout.readline() == b"making\n"
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / "x.partial" / "a").read_text() == "half"
    assert not (tmp_path / "x").exists()

    def make(aside: Path) -> None:
        assert not list(aside.iterdir())
        (aside / "a").write_text("anew")

    made_once(tmp_path / "x", make)
    assert (tmp_path / "x" / "a").read_text() == "anew"
    assert not (tmp_path / "x.partial").exists()


def test_of_two_processes_the_second_waits_for_the_first(tmp_path: Path):
    first, second = maker(tmp_path / "x"), None
    with first:
        assert first.stdout and first.stdout.readline() == b"making\n"
        with maker(tmp_path / "x") as second:
            time.sleep(0.2)  # either way it is right; so it is usually waiting
            assert first.stdin and second.stdin and second.stdout
            first.stdin.write(b"\n")
            first.stdin.flush()
            first.wait()
            second.stdin.close()
            assert second.stdout.read() == b""  # it made nothing
            second.wait()
    assert first.returncode == second.returncode == 0
    assert (tmp_path / "x" / "a").read_text() == "whole"


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RETENTIVE_CACHE", "/a")
    assert cache_root("/b") == Path("/b")
    assert cache_root() == Path("/a")
    monkeypatch.delenv("RETENTIVE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert cache_root() == Path("/c/retentive")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path(os.environ["HOME"], ".cache/retentive")
