"""A folder that appears whole or not at all."""

import glob
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from retentive.errors import InputError


def check_new(folder: Path) -> None:
    """InputError unless the folder can be made."""
    if os.path.lexists(folder):
        raise InputError(f"{folder} exists already; name a new folder, or move it away first")
    if not folder.parent.is_dir():
        raise InputError(f"{folder}: there is no folder {folder.parent}; make it first")
    if not os.access(folder.parent, os.W_OK):
        raise InputError(f"{folder}: no permission to write in {folder.parent}")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder to fill, which gets the name of `folder` at the end of the block.

    If the block fails nothing is left, nor after SIGTERM; what a killed process left goes with the
    next that makes `folder`. InputError where it cannot be made, or the disk is full.
    """
    check_new(folder)
    _remove_stale(folder)
    aside = _aside(folder, str(os.getpid()))
    try:
        with _ended_by_sigterm():
            aside.mkdir()
            yield aside
            aside.rename(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot write {folder}: {reason}; nothing was written") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _aside(folder: Path, process: str) -> Path:
    return folder.with_name(f".{folder.name}.{process}.partial")


def _remove_stale(folder: Path) -> None:
    """What processes that are no more have left of `folder`."""
    for left in folder.parent.glob(_aside(Path(glob.escape(str(folder))), "*").name):
        process = left.name.split(".")[-2]
        if process.isdecimal() and not _runs(int(process)):
            shutil.rmtree(left, ignore_errors=True)


def _runs(process: int) -> bool:
    """Is there another process of this number? One that had ours before us is none."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Within the block SIGTERM is a SystemExit, unless the program around has its own way with it.

    Outside the main thread Python takes no signals.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
