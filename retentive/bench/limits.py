"""The limits of the machine: rates of matrix products and of reading memory, as measured."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import torch
from torch import Tensor

from retentive.bench.workers.tasks import Stopwatch
from retentive.layers.cpu_training import product
from retentive.train.metrics import measure_gemm_rate

STREAM_BYTES = {"cpu": 2**28, "cuda": 2**30}
"""More than any cache holds, and on a GPU enough that the time of a launch is negligible."""
GPU_SIDE = 8192  # of a matrix: 1.4 ms in bfloat16 on an H100


@dataclass
class Limits:
    """Rates of large matrix products (FLOP/s) and of reading memory (bytes/s), sample by sample.

    Sampled between the rounds: a machine that slows down slows them with the contenders. The GEMM
    rate is that of `a @ b`, which every contender has; beside it is that of the product in our
    linear layers (`retentive.layers.linear`), on some processors another library's.
    """

    device: torch.device
    dtype: torch.dtype
    gemm_rates: list[float] = field(default_factory=list)
    stream_rates: list[float] = field(default_factory=list)
    linear_rates: list[float] = field(default_factory=list)

    def sample(self) -> None:
        if self.device.type == "cuda":
            return self._sample_gpu()
        for rates, multiply in ((self.gemm_rates, torch.matmul), (self.linear_rates, product)):
            rates.append(measure_gemm_rate(self.device, self.dtype, multiply, seconds=0.1))
        self.stream_rates.append(measure_stream_rate(self.device))

    def _sample_gpu(self) -> None:
        """By events around several runs, of which one takes a millisecond or less."""
        a, b = torch.randn(2, GPU_SIDE, GPU_SIDE, device=self.device).to(self.dtype)
        for rates, multiply in ((self.gemm_rates, torch.matmul), (self.linear_rates, product)):
            seconds = _fastest_on_gpu(partial(multiply, a, b))
            rates.append(2 * GPU_SIDE**3 / seconds)
        del a, b
        x = torch.ones(STREAM_BYTES["cuda"] // 4, device=self.device)
        self.stream_rates.append(x.nbytes / min(map(_fastest_on_gpu, ways_to_read(x))))
        del x
        torch.cuda.empty_cache()  # the contenders' memory

    @property
    def gemm(self) -> float:
        return median(self.gemm_rates) if self.gemm_rates else 0.0

    @property
    def stream(self) -> float:
        return median(self.stream_rates) if self.stream_rates else 0.0


def measure_stream_rate(device: torch.device, seconds: float = 0.2) -> float:
    """Bytes/s of the best of several ways to read a large buffer once, on all threads."""
    size = STREAM_BYTES["cpu"]
    x = torch.ones(size // 4, device=device)
    best, began = float("inf"), time.perf_counter()
    for way in itertools.cycle(ways_to_read(x)):
        start = time.perf_counter()
        way().flatten()[0].item()  # reading an element waits for the device
        end = time.perf_counter()
        best = min(best, end - start)
        if end - began > seconds:
            return size / best
    raise AssertionError


def ways_to_read(x: Tensor) -> list[Callable[[], Tensor]]:
    """Several, since none of them is as fast as memory on every machine."""
    rows = x.view(-1, 4096)
    return [
        lambda: x.sum(),
        lambda: x.max(),
        lambda: torch.dot(x, x),  # reads it twice, but the second time from the cache
        lambda: rows @ rows[0],
        lambda: rows.sum(1).amax(),
    ]


def _fastest_on_gpu(run: Callable[[], object], times: int = 3, together: int = 5) -> float:
    """Seconds of a run, the best of `times` means over `together` of them."""
    run()
    watch = Stopwatch("cuda")
    for _ in range(times):
        for _ in range(together):
            run()
        watch.lap()
    return min(watch.seconds()) / together


def available_bytes(device: torch.device) -> int | None:
    """Memory that is free on the device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
    except FileNotFoundError:
        return None
    return int(lines["MemAvailable"].split()[0]) * 1024
