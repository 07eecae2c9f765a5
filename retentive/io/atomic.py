"""A file that appears whole or not at all."""

import os
from pathlib import Path


def write_text(path: str | Path, text: str) -> None:
    """Write aside and rename: whoever reads `path` finds the old file or the new one, whole."""
    path = Path(path)
    aside = aside_of(path)
    try:
        aside.write_text(text, encoding="utf-8")
        replace_synced(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def aside_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def replace_synced(aside: Path, path: Path) -> None:
    """Rename once the bytes are on the disk: a crash of the machine leaves whole files, too."""
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)
