"""Turns, choices and failures, with contenders made up here in place of processes."""

import pytest
import torch

from retentive.bench import measure
from retentive.bench.contenders import CONTENDERS, REFERENCE, Contender, Entry, chosen
from retentive.bench.limits import Limits, available_bytes, measure_stream_rate
from retentive.bench.measure import fastest, measure_case
from retentive.bench.peers import Unavailable
from retentive.errors import InputError
from retentive.ops import BACKENDS, FORMS

CASE = {"task": "op", "device": "cpu", "dtype": "float32", "threads": 1, "tokens": 64, "batch": 1}
CASE |= {"heads": 1, "key_dim": 8, "value_dim": 8}


class Scripted:
    """A process whose runs take the seconds that its worker's name says, chunk size by chunk size.

    `log` has every call of all of them.
    """

    log: list[tuple[str, str]] = []  # noqa: RUF012
    seconds: dict[str, dict] = {}  # noqa: RUF012

    def __init__(self, worker, threads):
        self.worker, self.chunk_size = worker, None

    def prepare(self, case, on_message=None):
        self.log.append((self.worker, "prepare"))
        self.chunk_size = case.get("chunk_size")
        if self.seconds[self.worker][self.chunk_size] == "broken":
            raise Unavailable("out of memory: too much")
        return {"version": "1", "chunk_size": self.chunk_size}

    def run(self, **arguments):
        self.log.append((self.worker, "run"))
        seconds = self.seconds[self.worker][self.chunk_size]
        if seconds == "dies":
            raise Unavailable("its process was killed by signal 9")
        return {"seconds": [seconds]}

    def memory(self):
        return {"start": 1, "peak": 3, "resident": 2}

    def close(self):
        self.log.append((self.worker, "close"))


@pytest.fixture
def scripted(monkeypatch, quick_limits):
    monkeypatch.setattr(measure, "Process", Scripted)
    monkeypatch.setattr(Scripted, "log", [])

    def run(seconds, *, rounds=3):
        monkeypatch.setattr(Scripted, "seconds", seconds)
        entries = []
        for name, times in seconds.items():
            choices = {"op": tuple({"chunk_size": C} for C in times)} if None not in times else {}
            entries.append(Entry(Contender(name, name, "form", ("op",), choices=choices)))
        limits = Limits(torch.device("cpu"), torch.float32)
        return measure_case(CASE, entries, rounds, limits, sizes=["tokens"]), limits

    return run


def test_contenders_take_turns_and_limits_are_measured_between(scripted):
    rows, limits = scripted({"a": {None: 1.0}, "b": {None: 2.0}}, rounds=3)
    runs = [name for name, what in Scripted.log if what == "run"]
    assert runs == ["a", "b"] * 3
    assert len(limits.gemm_rates) == len(limits.stream_rates) == 3
    assert [row.seconds for row in rows] == [1.0, 2.0]
    assert rows[0].added_bytes == 2
    assert {("a", "close"), ("b", "close")} <= set(Scripted.log)


def test_the_fastest_choice_is_measured_in_a_process_of_its_own(scripted):
    times = {512: 2.0, 256: 1.0, 128: 3.0, 64: 0.1}
    (row,), _ = scripted({"peer": times}, rounds=2)
    assert row.chunk_size == 256 and row.samples == [[1.0], [1.0]]
    # 512, 256, 128 tried, which is slower: 64 is not; then a new process for 256.
    whats = [what for _, what in Scripted.log]
    assert whats == ["prepare", "run"] * 3 + ["close", "prepare", "run", "run", "close"]


def test_a_choice_that_fails_is_passed_over(scripted):
    (row,), _ = scripted({"peer": {512: "broken", 256: 1.0, 128: 2.0}})
    assert row.chunk_size == 256
    (row, fine), _ = scripted({"peer": {512: "broken", 256: "broken"}, "fine": {None: 1.0}})
    assert row.error == "out of memory: too much" and fine.error is None


def test_one_that_dies_between_rounds_is_a_row_with_the_reason(scripted):
    rows, _ = scripted({"a": {None: "dies"}, "b": {None: 2.0}})
    assert rows[0].error == "its process was killed by signal 9"
    assert len(rows[1].samples) == 3


def test_the_first_choice_is_always_compared_with_the_second():
    assert fastest("abc", dict(a=1, b=3, c=2).__getitem__) == "a"  # pyright: ignore
    assert fastest("abcd", dict(a=2, b=3, c=4, d=0).__getitem__) == "a"  # pyright: ignore
    assert fastest("ab", dict(a=float("inf"), b=float("inf")).__getitem__) is None  # pyright: ignore


def test_a_case_that_fits_for_nobody_is_refused_with_the_estimate(monkeypatch, quick_limits):
    monkeypatch.setattr(measure, "available_bytes", lambda device: 1000)
    entries = [Entry(contender) for contender in chosen("op", "retnet,retnet-recurrent")]
    limits = Limits(torch.device("cpu"), torch.float32)
    with pytest.raises(InputError, match=r"tokens 64: does not fit: about 0\.0 GiB .* smaller"):
        measure_case(CASE, entries, 1, limits, sizes=["tokens"])


def test_a_missing_package_comes_with_its_install_line():
    contender = Contender("x", "ours", "f", ("op",), package="no-such-package", extra="hf")
    reason = contender.missing("cpu")
    assert reason == "no-such-package is not installed: pip install 'retentive[hf]'"


def test_ours_is_there_in_every_form_and_backend():
    settings = [c.settings for c in CONTENDERS if "op" in c.tasks and c.worker == "ours"]
    assert {s["retention"] for s in settings if "retention" in s} == set(FORMS)
    assert {s["backend"] for s in settings if "backend" in s} == set(BACKENDS)


@pytest.mark.parametrize("task", ["op", "train", "prefill", "decode"])
def test_names_are_one_contender_each(task):
    names = [c.name for c in CONTENDERS if task in c.tasks and c.name != REFERENCE]
    assert len(names) == len(set(names)) and names[0] == "retnet"


def test_memory_streams_and_room():
    assert measure_stream_rate(torch.device("cpu"), seconds=0.01) > 1e8
    assert available_bytes(torch.device("cpu")) is None or available_bytes(torch.device("cpu"))
