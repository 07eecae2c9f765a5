"""Options that the benchmarks share."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from retentive.bench import contenders, results
from retentive.bench.contenders import Contender, Entry
from retentive.bench.limits import Limits
from retentive.bench.processes import Kept
from retentive.devices import resolve_device, resolve_dtype
from retentive.errors import InputError


@dataclass(frozen=True)
class Common:
    contenders: str = ""
    """Who takes part, with commas between; all that there are unless given."""
    device: str = "auto"
    """cpu, cuda, cuda:N, mps or auto."""
    dtype: str = ""
    """float32, bfloat16 or float16; on a GPU bfloat16 unless given, else float32."""
    threads: int = field(default_factory=torch.get_num_threads)
    rounds: int = 5
    """How often each contender has its turn; medians are reported."""
    out: Path | None = None
    """Write every number as JSON to this file, and figures beside it."""
    figures: Path | None = None
    """Write the figures into this folder instead."""
    compare: Path | None = None
    """Hold the result against this one, that an earlier --out wrote."""

    def __post_init__(self) -> None:
        for name in ("threads", "rounds"):
            check_positive(name, getattr(self, name))
        self._default(dtype="bfloat16" if self.on_gpu else "float32")

    def _default(self, **values: Any) -> None:
        """Takes these for the options that were not given."""
        for name, value in values.items():
            if getattr(self, name) in ("", (), None):
                object.__setattr__(self, name, value)

    @property
    def on_gpu(self) -> bool:
        """Whether it is to be measured on an NVIDIA GPU, be there one or not."""
        if self.device == "auto":
            return torch.cuda.is_available()
        return self.device.startswith("cuda")

    def taking_part(self, task: str) -> list[Contender]:
        """Those that are named, or all that there are; on a GPU those that belong there."""
        usual = ",".join(contenders.ON_GPU.get(task, ())) if self.on_gpu else ""
        return contenders.chosen(task, self.contenders or usual)

    def kept(self, stack: ExitStack, entries: Sequence[Entry]) -> Kept | None:
        """On a GPU the contenders' processes until `stack` ends; all import meanwhile."""
        if not self.on_gpu:
            return None
        kept = Kept()
        stack.callback(kept.close)
        for contender in (entry.contender for entry in entries):
            if contender.missing(self.device) is None:
                kept.started(contender.name, contender.worker, self.threads)
        return kept

    def limits(self) -> Limits:
        """Also sets the threads of this process, in which they are measured."""
        torch.set_num_threads(self.threads)
        return Limits(resolve_device(self.device), resolve_dtype(self.dtype))

    def case(self, task: str, limits: Limits) -> dict[str, Any]:
        """What all cases of this run share."""
        device = str(limits.device)
        return {"task": task, "device": device, "dtype": self.dtype, "threads": self.threads}

    def old(self, benchmark: str) -> results.Result | None:
        return None if self.compare is None else results.load(self.compare, benchmark)

    def check_writable(self) -> None:
        """Makes folders and file now: what cannot be written is known before the minutes."""
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.open("a").close()
        if self.figures is not None:
            self.figures.mkdir(parents=True, exist_ok=True)

    @property
    def figure_stem(self) -> Path | None:
        """Figures are named after the result; None where nobody asked for any."""
        if self.figures is not None:
            own = type(self).__name__.removesuffix("Benchmark").lower()
            return self.figures / (self.out.stem if self.out else own)
        return None if self.out is None else self.out.with_suffix("")


def check_positive(name: str, *values: int, least: int = 1) -> None:
    if bad := [value for value in values if value < least]:
        raise InputError(f"{name} must be at least {least}, got {bad[0]}")
