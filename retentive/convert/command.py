"""`retentive convert`: a RetNet checkpoint of anybody's as a model folder, or ours as theirs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from retentive.arguments import parse
from retentive.convert.conversion import Stream, convert
from retentive.convert.plan import Plan
from retentive.models.checkpoint import WEIGHTS


@dataclass(frozen=True)
class Options:
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """A folder or a file of weights, of ours or of anybody's, or a name on the Hugging Face Hub."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """The folder to write."""
    to: str | None = None
    """fla or torchscale: write what these open; without it, a folder of ours."""
    dtype: str | None = None
    """float32, bfloat16, float16 or float64; without it, as the weights are stored."""


def main(argv: Sequence[str]) -> None:
    options = parse(
        Options,
        argv,
        "retentive convert",
        "Converts RetNet checkpoints, and checks that every tensor was used and every one filled.",
    )
    to, dtype = options.to, options.dtype
    made = convert(options.source, options.out, to=to, dtype=dtype, say=print, watch=_bar)
    size = (options.out.expanduser() / WEIGHTS).stat().st_size
    print(f"wrote {options.out}: {len(made.tensors)} tensors, {size / 1e6:.1f} MB")


def _bar(stream: Stream, made: Plan) -> Stream:
    """Shows on a terminal how much is written."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    with Progress(
        BarColumn(bar_width=24),
        DownloadColumn(),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as progress:
        total = sum(stored.nbytes for stored in made.tensors.values())
        task = progress.add_task("", total=total)
        for name, tensor in stream:
            yield name, tensor
            progress.advance(task, tensor.nbytes)
