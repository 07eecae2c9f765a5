"""Folders that are made once: written aside, renamed when whole, by one process at a time."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def cache_root(folder: str | None = None) -> Path:
    """`folder`, or $RETENTIVE_CACHE, or `retentive` in the user's cache folder."""
    if folder := folder or os.environ.get("RETENTIVE_CACHE"):
        return Path(os.path.expanduser(folder))
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "retentive")


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`; where it does not exist, `make` fills a folder beside it that is then renamed.

    A second process waits for the first. The lock ends with the process that holds it, so whatever
    lies aside when the lock is had was left by one that was killed.
    """
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            aside = Path(f"{folder}.partial")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            try:
                make(aside)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
            for path in aside.iterdir():
                _sync(path)
            aside.rename(folder)
    return folder


def _sync(path: Path) -> None:
    """To the disk itself: a renamed folder must be whole after a power cut too."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
