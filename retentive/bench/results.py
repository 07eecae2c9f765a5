"""Results as JSON: rows with every sample, the machine, and two runs held against each other."""

import importlib.metadata
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from retentive import __version__
from retentive.bench.limits import Limits
from retentive.errors import InputError
from retentive.io.atomic import write_text

FORMAT = 3
READABLE = (2, FORMAT)
"""Format 2 is what 3 is without `roofline`."""


@dataclass
class Row:
    """One contender in one case; or the reason why there is nothing to show of it."""

    contender: str
    case: dict[str, int | str]
    """What tells this row from the contender's others: tokens, batch, context."""
    version: str = ""
    form: str = ""
    dtype: str = ""
    parameters: int | None = None
    chunk_size: int | None = None
    weight_bytes: int | None = None
    """Read for a token, where the contender says so: weights may be of several dtypes."""
    tokens: int = 0
    """Tokens of one timed run."""
    samples: list[list[float]] = field(default_factory=list)
    """Seconds of every run, a list for each round."""
    forward: list[float] = field(default_factory=list)
    """Of an op: the part of each sample that was the forward pass."""
    work: float = 0.0
    """FLOPs of a run; bytes of one where the limit is reading memory."""
    limit: float = 0.0
    """Of the machine in this case: FLOP/s, or bytes/s."""
    roofline: dict[str, float] | None = None
    """Of retention: the seconds that the machine's limits allow (`retentive.bench.roofline`)."""
    memory: dict[str, int] | None = None
    """Bytes of its process: at its start, at its peak, resident in the end; of its state."""
    error: str | None = None

    @property
    def seconds(self) -> float:
        """The median over the rounds, of each the median."""
        return median(map(median, self.samples))

    @property
    def spread(self) -> tuple[float, float]:
        """The fastest and the slowest round over the median one."""
        rounds = [median(times) for times in self.samples]
        return min(rounds) / self.seconds, max(rounds) / self.seconds

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def fraction(self) -> float:
        """Of what the machine's limit allows."""
        return self.work / self.seconds / self.limit

    @property
    def added_bytes(self) -> int:
        """The peak of its process above its start."""
        assert self.memory is not None
        return self.memory["peak"] - self.memory["start"]

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.contender, *sorted(self.case.items()))


@dataclass
class Result:
    """One run of a benchmark."""

    benchmark: str
    options: dict[str, Any]
    rows: list[Row]
    limits: dict[str, list[float]]
    machine: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)
    """What only this benchmark has."""
    format: int = FORMAT

    @classmethod
    def begun(cls, benchmark: str, options: Any, limits: Limits) -> "Result":
        """Without rows yet; the limits' samples show as they come."""
        rates = {
            "gemm_flops": limits.gemm_rates,
            "linear_flops": limits.linear_rates,
            "stream_bytes": limits.stream_rates,
        }
        return cls(benchmark, _plain(asdict(options)), [], rates, machine(limits.device))

    def save(self, path: Path | None) -> None:
        if path is not None:
            write_text(path, json.dumps(asdict(self), indent=1) + "\n")


def load(path: Path, benchmark: str) -> Result:
    """Raises InputError for a file that holds no result of this benchmark and format."""
    if not path.is_file():
        raise InputError(f"no file {path}; give one that bench {benchmark} --out wrote")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        given = (fields["benchmark"], fields["format"])
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} holds no benchmark's result; give a file that bench {benchmark} --out wrote"
        ) from None
    if given not in [(benchmark, version) for version in READABLE]:
        raise InputError(
            f"{path} holds a result of bench {given[0]}, format {given[1]}; this is bench"
            f" {benchmark}, format {FORMAT}: measure the old version again with its --out"
        )
    rows = [Row(**row) for row in fields.pop("rows")]
    return Result(rows=rows, **{**fields, "format": FORMAT})


def compare(old: Result, new: Result) -> list[tuple[Row, float]]:
    """The new rows that were measured before, and how many times as fast they are now.

    Each is taken as the fraction of its own run's limit, so that a machine that was slower on one
    of the days changes nothing.
    """
    before = {row.key: row for row in old.rows if row.error is None}
    return [
        (row, row.fraction / before[row.key].fraction)
        for row in new.rows
        if row.error is None and row.key in before
    ]


def machine(device: torch.device) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "retentive": __version__,
        **(on_gpu(*torch.cuda.get_device_capability(device)) if gpu else {}),
    }


def on_gpu(major: int, minor: int) -> dict[str, str | None]:
    """What kernels are made by, for a GPU of this compute capability."""
    made_by = {"cuda": torch.version.cuda, "triton": None, "ptxas": None}
    if find_spec("triton") is not None:
        from triton.backends.nvidia.compiler import get_ptxas

        made_by["triton"] = importlib.metadata.version("triton")
        made_by["ptxas"] = get_ptxas(10 * major + minor).version
    return made_by


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """As JSON has them."""
    return json.loads(json.dumps(options, default=str))
