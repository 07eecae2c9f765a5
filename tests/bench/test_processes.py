"""A contender's process: its answers, and the line that says why it failed or died."""

import os
import signal

import pytest
import torch
import zoo

from retentive.bench import measure, processes
from retentive.bench.contenders import Entry, chosen
from retentive.bench.limits import Limits
from retentive.bench.measure import measure_case
from retentive.bench.models import ReferenceModel
from retentive.bench.peers import Unavailable
from retentive.bench.processes import Process, ProcessPool

OP = {"task": "op", "device": "cpu", "dtype": "float32", "threads": 1, "tokens": 64, "batch": 1}
OP |= {"heads": 1, "key_dim": 8, "value_dim": 8}
SMALL = zoo.retnet(vocab_size=32, hidden_size=64, num_hidden_layers=1, num_heads=2)


@pytest.fixture
def process(monkeypatch):
    made = Process("ours", 1)
    yield made
    made.close()


def test_a_case_after_the_other(process):
    (op,) = (Entry(c) for c in chosen("op", "retnet"))
    assert process.prepare(op.case(OP))["chunk_size"] > 0
    assert len(process.run()["seconds"]) == 1
    memory = process.memory()
    assert memory["peak"] >= memory["start"] > 10**7
    with pytest.raises(Unavailable, match=r"unknown form 'chunk' .did you mean"):
        process.prepare({**op.case(OP), "retention": "chunk"})
    (model,) = (Entry(c, ReferenceModel("small", SMALL)) for c in chosen("decode", "retnet-eager"))
    case = {"task": "decode", "device": "cpu", "dtype": "float32", "threads": 1}
    facts = process.prepare(model.case({**case, "batch": 2, "context": 70}))
    assert facts["form"] == "recurrent" and facts["parameters"] > 0
    assert len(process.run(seconds=0)["seconds"]) == 3


def test_one_that_is_killed_says_so(process):
    process.memory()
    os.kill(process._process.pid, signal.SIGKILL)
    with pytest.raises(Unavailable, match="killed by signal 9, most likely for want of memory"):
        process.run()


def test_one_that_ends_at_once_shows_its_last_line():
    process = Process("nobody", 1)
    with pytest.raises(Unavailable, match=r"ended with code 1: .*nobody"):
        process.memory()
    process.close()


def test_a_peer_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("retentive.bench.processes.installed_peers", lambda: tmp_path)
    process = Process("peers", 1)
    (peer,) = (Entry(c) for c in chosen("op", "yet-another-retnet"))
    with pytest.raises(Unavailable, match="No module named 'yet_another_retnet'"):
        process.prepare({**peer.case(OP), "chunk_size": 64})
    process.close()


def test_processes_of_a_pool_serve_case_after_case(quick_limits, local_processes, monkeypatch):
    started, released = [], []

    class Counted(measure.Process):  # the fixture's, in this process
        def __init__(self, worker: str, threads: int):
            started.append(worker)
            super().__init__(worker, threads)

        def release(self) -> None:
            released.append(self)

    monkeypatch.setattr(processes, "Process", Counted)
    entries = [Entry(contender) for contender in chosen("op", "retnet,attention")]
    limits, pool = Limits(torch.device("cpu"), torch.float32), ProcessPool()
    for apart in (False, True):
        rows = measure_case(OP, entries, 2, limits, sizes=["tokens"], pool=pool, apart=apart)
        assert [row.error for row in rows] == [None, None]
        assert [len(row.samples) for row in rows] == [2, 2]
    assert started == ["ours", "ours"] and len(released) == 4
    assert len(limits.gemm_rates) == 2 + 4  # rounds together, then of each


def test_a_process_of_a_pool_that_died_is_started_anew():
    pool = ProcessPool()
    dead = pool.get("retnet", "ours", 1)
    os.kill(dead._process.pid, signal.SIGKILL)
    pool.release("retnet")
    assert pool.get("retnet", "ours", 1) is not dead
    pool.close()
