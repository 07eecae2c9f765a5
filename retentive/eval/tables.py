"""What the tables of all evaluations share."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def console() -> "Console":
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 110, highlight=False)
