"""What a person sees of an evaluation, on stderr: a bar on a terminal, elsewhere lines."""

import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY = 20.0  # seconds, where there is no terminal for a bar


class Display:
    """Shows how much of `total` is done, its rate and the time left."""

    def __init__(self, total: int, unit: str, console: Console | None = None):
        self.total, self.unit, self.done = total, unit, 0
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.progress = Progress(
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task("", total=total, status="")
        self.started = self.last_line = time.monotonic()
        self.known = 0  # of them done before: they say nothing about the rate

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def skip(self, count: int) -> None:
        """So many were finished by an earlier run."""
        self.known += count
        self.advance(count)

    def advance(self, count: int, what: str = "") -> None:
        self.done += count
        now = time.monotonic()
        rate = (self.done - self.known) / max(now - self.started, 1e-9)
        status = f"{self.done:,}/{self.total:,} {self.unit} · {rate:,.{0 if rate >= 100 else 1}f}/s"
        status = f"{what} · {status}" if what else status
        self.progress.update(self.task, completed=self.done, status=status)
        finished = self.done >= self.total
        if self.progress.disable and (now - self.last_line > LINE_EVERY or finished):
            self.last_line = now
            left = timedelta(seconds=round((self.total - self.done) / rate)) if rate else "?"
            self.say(status if finished else f"{status} · {left} left")

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        self.console.print(text, markup=False)
