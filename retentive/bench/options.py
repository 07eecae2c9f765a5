"""Options that the benchmarks share."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from retentive.bench import contenders, results
from retentive.bench.contenders import Entry
from retentive.bench.limits import Limits
from retentive.bench.models import ReferenceModel
from retentive.bench.processes import ProcessPool
from retentive.devices import resolve_device, resolve_dtype
from retentive.errors import InputError


@dataclass(frozen=True)
class Common:
    contenders: str = ""
    """The contenders, with commas between; all unless given, on a GPU those made for one."""
    device: str = "auto"
    """cpu, cuda, cuda:N, mps or auto."""
    dtype: str = ""
    """float32, bfloat16 or float16; on a GPU bfloat16 unless given, else float32."""
    threads: int = field(default_factory=torch.get_num_threads)
    """Of a CPU, for each contender."""
    rounds: int = 5
    """How often each contender has its turn; medians are reported."""
    out: Path | None = None
    """Write every number as JSON to this file, and figures beside it."""
    figures: Path | None = None
    """Write the figures into this folder instead."""
    compare: Path | None = None
    """Compare with this result, that an earlier --out wrote."""

    def __post_init__(self) -> None:
        for name in ("threads", "rounds"):
            check_positive(name, getattr(self, name))
        self._default(dtype="bfloat16" if self.on_gpu else "float32")

    def _default(self, **values: Any) -> None:
        """Sets the options among these that were not given."""
        for name, value in values.items():
            if getattr(self, name) in ("", (), None):
                object.__setattr__(self, name, value)

    @property
    def on_gpu(self) -> bool:
        """Whether it is to be measured on an NVIDIA GPU, be there one or not."""
        if self.device == "auto":
            return torch.cuda.is_available()
        return self.device.startswith("cuda")

    def entries(self, task: str, model: ReferenceModel | None = None) -> list[Entry]:
        """The contenders of a task beside `model`: those named, or the usual ones."""
        usual = contenders.ON_GPU.get(task, ()) if self.on_gpu else ()
        return contenders.entries(task, self.contenders, model, usual=usual)

    def pool(self, stack: ExitStack, entries: Sequence[Entry]) -> ProcessPool | None:
        """On a GPU the contenders' processes until `stack` ends; all begin to import at once."""
        if not self.on_gpu:
            return None
        pool = ProcessPool()
        stack.callback(pool.close)
        for contender in (entry.contender for entry in entries):
            if contender.missing(self.device) is None:
                pool.get(contender.name, contender.worker, self.threads)
        return pool

    def limits(self) -> Limits:
        """Also sets the threads of this process, in which they are measured."""
        torch.set_num_threads(self.threads)
        return Limits(resolve_device(self.device), resolve_dtype(self.dtype))

    def case(self, task: str, limits: Limits) -> dict[str, Any]:
        """The part that all cases of this run share."""
        device = str(limits.device)
        return {"task": task, "device": device, "dtype": self.dtype, "threads": self.threads}

    def old(self, benchmark: str) -> results.Result | None:
        """The result to compare with."""
        return None if self.compare is None else results.load(self.compare, benchmark)

    def check_writable(self) -> None:
        """Makes folders and file now, so that a refusal comes before minutes of measuring."""
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.open("a").close()
        if self.figures is not None:
            self.figures.mkdir(parents=True, exist_ok=True)

    @property
    def figure_stem(self) -> Path | None:
        """The figures' path without ending, after the result's; None where none are asked for."""
        if self.figures is not None:
            own = type(self).__name__.removesuffix("Benchmark").lower()
            return self.figures / (self.out.stem if self.out else own)
        return None if self.out is None else self.out.with_suffix("")


def check_positive(name: str, *values: int, least: int = 1) -> None:
    if bad := [value for value in values if value < least]:
        raise InputError(f"{name} must be at least {least}, got {bad[0]}")
