"""Quick limits, and contenders that run in this process."""

import importlib
import json
from collections.abc import Callable

import pytest

from retentive.bench import along, limits, measure
from retentive.bench.limits import Limits
from retentive.bench.peers import Unavailable
from retentive.bench.workers import serving


@pytest.fixture
def quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(self: Limits) -> None:
        self.gemm_rates.append(1e11)
        self.linear_rates.append(2e11)
        self.stream_rates.append(2e10)

    monkeypatch.setattr(limits.Limits, "sample", sample)


class Local:
    """A contender in this process: quick, and its measurements mean nothing."""

    def __init__(self, worker: str, threads: int):
        self._module = importlib.import_module(f"retentive.bench.workers.{worker}")

    def prepare(self, case: dict, on_message: Callable | None = None) -> dict:
        def send(answer: dict) -> None:
            if on_message is not None:
                on_message(answer["message"])

        try:
            facts, self._run = self._module.prepare(case, send)
        except Exception as error:
            raise Unavailable(serving.reason(error)) from error
        return json.loads(json.dumps(facts))

    def run(self, **arguments: object) -> dict:
        return self._run(**arguments)

    def memory(self) -> dict[str, int]:
        return {"start": 2**20, **serving.memory("cpu")}

    def close(self) -> None:
        pass


@pytest.fixture
def local_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (measure, along):
        monkeypatch.setattr(module, "Process", Local)


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> str:
    """A size by name that takes seconds."""
    from retentive.bench import models

    fields = {"vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 1, "num_heads": 2}
    monkeypatch.setitem(models.BENCHMARK_SIZES, "tiny", fields)
    return "tiny"
