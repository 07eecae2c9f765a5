"""`retentive bench decode`: does a token cost the same, however much has been read?"""

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from retentive.bench.output import check_writable
from retentive.demo.decode import Measure, measure
from retentive.errors import InputError
from retentive.models.checkpoint import load_config, save_model
from retentive.models.config import RetNetConfig
from retentive.models.files import write_text
from retentive.models.retnet import RetNet


@dataclass(frozen=True)
class DecodeBenchmark:
    model: str = "demo"
    """A RetNet's model folder, or a size by name, with random weights: those are as fast."""
    tokens: int = 100_000
    """Decoded one by one, without a stop."""
    out: Path | None = None
    """Write every number as JSON to this file."""

    def __post_init__(self) -> None:
        if self.tokens < 1024:
            raise InputError(f"tokens must be at least 1024, got {self.tokens}")


def run(options: DecodeBenchmark) -> None:
    check_writable(options.out)
    if (given := Path(options.model)).is_dir():
        if not isinstance(load_config(given), RetNetConfig):
            raise InputError(f"{given} holds no RetNet; give a RetNet's model folder or a size")
        return _run(options, given)
    model = RetNet(RetNetConfig.named(options.model))
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder)
        _run(options, Path(folder))


def _run(options: DecodeBenchmark, folder: Path) -> None:
    from rich.progress import Progress

    with Progress(transient=True) as progress:
        task = progress.add_task(f"decoding {options.tokens:,} tokens", total=options.tokens)
        measures = measure(
            "RetNet", folder, options.tokens, lambda at: progress.update(task, completed=at)
        )
    drift = drifts(measures)
    if options.out is not None:
        result: dict[str, Any] = {"benchmark": "decode", "format": 1, "drift": drift}
        result |= {"options": {**asdict(options), "out": None}}
        result |= {"measures": [asdict(at) for at in measures]}
        write_text(options.out, json.dumps(result, indent=1) + "\n")
    show(measures, drift)


def drifts(measures: list[Measure]) -> dict[str, float]:
    """The last quarter of a run over its first: medians of time a token and of resident memory."""
    quarter = len(measures) // 4
    first, last = measures[:quarter], measures[-quarter:]
    return {
        name: median(getattr(at, name) for at in last) / median(getattr(at, name) for at in first)
        for name in ("seconds", "resident")
    }


def show(measures: list[Measure], drift: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="decoding one text, token by token")
    for title in ("tokens read", "ms a token", "state", "resident"):
        table.add_column(title, justify="right")
    for at in measures[:: max(1, len(measures) // 8)]:
        table.add_row(
            f"{at.position:,}",
            f"{1000 * at.seconds:.2f}",
            f"{at.state / 2**20:.1f} MiB",
            f"{at.resident / 2**20:.1f} MiB",
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"last quarter over first: time a token x{drift['seconds']:.3f}, "
        f"resident memory x{drift['resident']:.3f}"
    )
