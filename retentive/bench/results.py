"""Results as JSON: rows with every sample, the machine; and the comparison of two runs."""

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
"""Format 2 is format 3 without `roofline`."""


@dataclass
class Row:
    """One contender in one case; or `error`, the reason why it was not measured."""

    contender: str
    case: dict[str, int | str]
    """The sizes that tell this row from the contender's others: tokens, batch, context."""
    version: str = ""
    form: str = ""
    dtype: str = ""
    parameters: int | None = None
    chunk_size: int | None = None
    weight_bytes: int | None = None
    """Bytes read for a token, where the contender reports them: dtypes may be mixed."""
    tokens: int = 0
    """Tokens of one timed run."""
    samples: list[list[float]] = field(default_factory=list)
    """Seconds of every run, in a list for each round."""
    forward: list[float] = field(default_factory=list)
    """Of an op: the seconds of each sample's forward pass."""
    work: float = 0.0
    """FLOPs of a run, or bytes where the limit is reading memory."""
    limit: float = 0.0
    """The machine's rate in this case: FLOP/s, or bytes/s."""
    roofline: dict[str, float] | None = None
    """Of retention: the least seconds by the machine's limits (`retentive.bench.roofline`)."""
    memory: dict[str, int] | None = None
    """Bytes of its process at the start, at the peak, resident at the end; of its state."""
    error: str | None = None

    @property
    def seconds(self) -> float:
        """The median over the rounds of each round's median."""
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
        """The part of the machine's limit that it reached."""
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
    """Results that only this benchmark has."""
    format: int = FORMAT

    @classmethod
    def new(cls, benchmark: str, options: Any, limits: Limits) -> "Result":
        """Without rows yet; later samples of the limits are part of it."""
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
    """Raises InputError for a file without a result of this benchmark in a readable format."""
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
    """The new rows that the old run has, too, and how many times as fast they are now.

    Each counts as a fraction of its own run's limit, so that a slower machine changes nothing.
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
        **(kernel_tools(*torch.cuda.get_device_capability(device)) if gpu else {}),
    }


def kernel_tools(major: int, minor: int) -> dict[str, str | None]:
    """The versions of the tools that make kernels for a GPU of this compute capability."""
    tools = {"cuda": torch.version.cuda, "triton": None, "ptxas": None}
    if find_spec("triton") is not None:
        from triton.backends.nvidia.compiler import get_ptxas

        tools["triton"] = importlib.metadata.version("triton")
        tools["ptxas"] = get_ptxas(10 * major + minor).version
    return tools


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Converted to the types of JSON."""
    return json.loads(json.dumps(options, default=str))
