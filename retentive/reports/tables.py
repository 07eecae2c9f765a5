"""The style of all tables, and numbers of bytes as people read them."""

import os
import sys
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDTH = 110  # of a file or a pipe, which have none


def console() -> "Console":
    from rich.console import Console

    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if has_width else WIDTH, highlight=False)


def new_table(title: str, columns: Sequence[str], words: Collection[str] = ()) -> "Table":
    """An empty table. Columns hold numbers, set to the right, but for those of `words`."""
    from rich.table import Table

    made = Table(title=title or None, title_justify="left")
    for name in columns:
        made.add_column(name, justify="left" if name in words else "right")
    return made


def size(count: float) -> str:
    """`count` bytes, to three digits."""
    return scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def scaled(value: float, base: int, units: Sequence[str]) -> str:
    """`value` in the first of the units, each `base` times the one before, that needs 3 digits."""
    for unit in units[:-1]:
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= base
    return f"{value:.3g} {units[-1]}"
