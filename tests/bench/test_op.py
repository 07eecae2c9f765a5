"""The op benchmark: what it counts, how it chooses, what it does with a contender that fails."""

import json

import pytest

from retentive.bench import op
from retentive.bench.command import main
from retentive.bench.peers import PeerOp, PeerUnavailable
from retentive.errors import InputError


class Scripted:
    """A contender whose runs take the seconds given for each chunk size."""

    version, form = "1", "chunkwise"

    def __init__(self, name, seconds):
        self.name, self.seconds, self.chunk_sizes = name, seconds, tuple(seconds)
        self.prepared, self.closed = [], 0

    def prepare(self, case):
        self.prepared.append(case["chunk_size"])
        if self.seconds[case["chunk_size"]] is None:
            raise PeerUnavailable("no memory")

    def run(self):
        seconds = self.seconds[self.prepared[-1]]
        return seconds / 4, 3 * seconds / 4

    def close(self):
        self.closed += 1


@pytest.fixture
def instant_gemm(monkeypatch):
    monkeypatch.setattr(op, "measure_gemm_rate", lambda device, dtype: 1e11)


def test_flops_are_counted_at_a_chunk_of_64():
    # By hand: per head and token 2·64·192 inside a chunk and 4·64·128 through the state,
    # 24576 + 32768 = 57344; three times that, for 8 heads.
    assert op._flops_per_token(op.OpBenchmark()) == 3 * 8 * 57344


def test_contenders_keep_their_best_chunk_size_and_a_failure_is_a_row(instant_gemm):
    fast = Scripted("fast", {512: 2.0, 256: 1.0, 128: 3.0, 64: 0.1})
    broken = Scripted("broken", {64: None})
    case = op._measure_case(op.OpBenchmark(rounds=4), 512, [fast, broken])
    assert fast.prepared == [512, 256, 128, 256]
    assert fast.closed == broken.closed == 1
    row, reason = case["rows"]
    assert row["chunk_size"] == 256 and row["seconds"] == [(0.25, 0.75)] * 4
    assert reason["error"] == "no memory" and "seconds" not in reason


def test_a_run_is_a_table_and_a_file(instant_gemm, monkeypatch, tmp_path, capsys):
    class Missing(PeerOp):
        def _start(self):
            raise PeerUnavailable("not installed: no network")

    monkeypatch.setattr(op, "PeerOp", Missing)
    out = tmp_path / "new" / "op.json"
    options = ["--lengths", "1024", "--ours-only", "1100", "--heads", "1", "--rounds", "2"]
    assert main(["op", *options, "--key-dim", "8", "--value-dim", "8", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [case["tokens"] for case in result["cases"]] == [1024, 1100]
    names = [row["name"] for row in result["cases"][0]["rows"]]
    assert names == ["retentive", "yet-another-retnet", "yet-another-retnet", "torchscale"]
    assert all(len(case["rows"][0]["seconds"]) == 2 for case in result["cases"])
    table = capsys.readouterr().out
    assert table.count("not installed: no network") == 3


def test_a_peer_that_dies_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("retentive.bench.peers.installed_peers", lambda: tmp_path)
    peer = PeerOp("torchscale")
    case = {"tokens": 8, "heads": 1, "key_dim": 4, "value_dim": 4, "threads": 1, "chunk_size": 4}
    with pytest.raises(PeerUnavailable, match="ModuleNotFoundError: No module named 'torchscale'"):
        peer.prepare(case)
    assert peer._process is not None
    peer._process.kill()
    with pytest.raises(PeerUnavailable, match="process died"):
        peer.run()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["opp"], "unknown benchmark 'opp' .did you mean 'op'"),
        (["op", "--lengths", "1500"], "multiples of 1024, got 1500"),
        (["op", "--lengths", "0"], "at least 1024 tokens, got 0"),
        (["op", "--rounds", "0"], "rounds must be at least 1, got 0"),
        (["op", "--round", "3"], "did you mean --rounds"),
    ],
)
def test_bad_options_are_refused(argv, words):
    with pytest.raises(InputError, match=words):
        main(argv)
