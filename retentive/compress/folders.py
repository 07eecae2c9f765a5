"""A folder that appears whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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

    If the block fails nothing is left. InputError where `folder` cannot be made, or the disk is
    full.
    """
    check_new(folder)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        aside.mkdir()
        yield aside
        aside.rename(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot write {folder}: {reason}; nothing was written") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
