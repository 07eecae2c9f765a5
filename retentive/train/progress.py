"""What a person sees of a run, on stderr: a bar on a terminal, elsewhere a line now and then."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY = 20.0  # seconds, where there is no terminal for a bar


class Display:
    """Shows the loss, the speed and the time left of a run of `steps` steps that starts at `step`.

    `gemm_seconds`: what a token would take at the machine's GEMM rate.
    """

    def __init__(self, step: int, steps: int, gemm_seconds: float, quiet: bool = False):
        self.gemm_seconds = gemm_seconds
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self.progress = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task("", total=steps, completed=step, status="")
        self.steps = steps
        self.started_at, self.started = step, time.monotonic()
        self.last_line = self.started
        self.speed: float | None = None  # tokens/s, running mean

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

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        before = tokens_per_second if self.speed is None else self.speed
        self.speed = 0.9 * before + 0.1 * tokens_per_second
        fraction = self.speed * self.gemm_seconds
        status = f"loss {loss:.3f} · {self.speed:,.0f} tokens/s · {fraction:.0%} of GEMM rate"
        self.progress.update(self.task, completed=step, status=status)
        now = time.monotonic()
        if self.progress.disable and (now - self.last_line > LINE_EVERY or step == self.steps):
            self.last_line = now
            left = (now - self.started) / (step - self.started_at) * (self.steps - step)
            self.say(f"step {step}/{self.steps} · {status} · {_clock(left)} left")

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        self.console.print(text, markup=False)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
