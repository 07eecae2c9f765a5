"""Where a benchmark's numbers go."""

from pathlib import Path


def check_writable(out: Path | None) -> None:
    """Makes the folder and the file now: what cannot be written is known before the minutes."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.touch()
