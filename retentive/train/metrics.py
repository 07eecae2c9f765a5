"""What a run measures: metrics.jsonl, TensorBoard, the loss curve, the machine's GEMM rate.

metrics.jsonl has one JSON object a line, each with its `step`: an update's `loss` (nats a token)
with `lr`, `grad_norm`, `tokens`, `tokens_per_second`, `gemm_fraction` and `seconds`; a validation's
`valid_loss` and `bits_per_byte`; a `sample`.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retentive.errors import InputError
from retentive.layers.cpu_training import product
from retentive.reports.figures import BLUE, ORANGE, figure

Record = dict[str, Any]


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics.jsonl, without a last line that a killed run left unfinished."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class MetricsLog:
    """Appends records to a run's metrics.jsonl, and their numbers to TensorBoard if asked.

    `step` is the step the run goes on from: what a run that was cut off had written past it is
    dropped.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool = False):
        self._events = _summary_writer(folder, step) if tensorboard else None
        self.path = folder / "metrics.jsonl"
        kept = (
            [r for r in read_metrics(self.path) if r["step"] <= step]
            if step and self.path.exists()
            else []
        )
        aside = self.path.with_suffix(".tmp")
        aside.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        os.replace(aside, self.path)

    def write(self, step: int, **values: Any) -> None:
        # Closed each time, so that a killed run keeps every line.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._events:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._events.add_scalar(name, value, step)

    def close(self) -> None:
        if self._events:
            self._events.close()


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(
            "train.tensorboard needs the package tensorboard: pip install retentive[tensorboard], "
            "or leave the key out"
        ) from None
    return SummaryWriter(folder / "tensorboard", purge_step=step + 1)


def plot_curve(records: list[Record], path: Path) -> None:
    """Draws the losses of training and validation, and beside them bits per byte, as a PNG."""
    updates = [r for r in records if "loss" in r]
    validations = [r for r in records if "valid_loss" in r]
    with figure(path.with_suffix(""), size=(10, 4), kinds=("png",)) as drawn:
        loss, bits = drawn.subplots(1, 2)
        steps, losses = [r["step"] for r in updates], [r["loss"] for r in updates]
        loss.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=0.8)
        loss.plot(steps, _running_mean(losses), color=BLUE, label="training (running mean)")
        steps = [r["step"] for r in validations]
        valid = {"color": ORANGE, "marker": "o", "label": "validation"}
        loss.plot(steps, [r["valid_loss"] for r in validations], **valid)
        bits.plot(steps, [r["bits_per_byte"] for r in validations], **valid)
        loss.set(xlabel="step", ylabel="loss, nats a token")
        bits.set(xlabel="step", ylabel="bits per byte")
        loss.legend()


def _running_mean(values: list[float]) -> list[float]:
    """Exponential mean over a fiftieth of the values, corrected for its start as Adam's is."""
    smoothing = 1 - 1 / (1 + len(values) / 50)
    means, mean = [], 0.0
    for n, value in enumerate(values, start=1):
        mean = smoothing * mean + (1 - smoothing) * value
        means.append(mean / (1 - smoothing**n))
    return means


def measure_gemm_rate(
    device: torch.device,
    dtype: torch.dtype,
    multiply: Callable[[Tensor, Tensor], Tensor] = product,
    seconds: float = 0.3,
) -> float:
    """FLOP/s of a large matrix product: the best one within `seconds`, after one to warm up.

    By default of the product that the models' linear layers take (`retentive.layers.linear`).
    """
    n = 1024 if device.type == "cpu" else 4096
    private = torch.Generator(device)  # a resumed run has its own random numbers restored by now
    a, b = torch.randn(2, n, n, device=device, generator=private).to(dtype)
    best = float("inf")
    multiply(a, b)[0, 0].item()
    deadline = time.perf_counter() + seconds
    while (start := time.perf_counter()) < deadline:
        multiply(a, b)[0, 0].item()  # reading an element waits for the product on every device
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
