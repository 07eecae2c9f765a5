"""Decoding along one sequence: drift by hand, the turns, and marks in a process of its own."""

import pytest
import zoo

from retentive.bench import along
from retentive.bench.peers import Unavailable
from retentive.errors import InputError
from retentive.models.checkpoint import save_model
from retentive.models.counts import state_bytes
from retentive.models.matching import matching_transformer
from retentive.models.retnet import RetNet


def test_drift_is_the_last_quarter_over_the_first():
    assert along.drift([1.0, 1.0, 9.0, 9.0, 9.0, 9.0, 1.5, 1.5]) == 1.5


def test_marks_rise_to_the_last_token():
    marks = along.marks_along(16384)
    assert marks[0] == 128 and marks[-1] == 16384 and len(marks) == along.MARKS
    assert marks == sorted(set(marks))


def test_blocks_are_timed_in_turn(monkeypatch):
    monkeypatch.setattr(along, "BLOCK_ROUNDS", 2)
    order = []
    samples = along.in_turn(3, lambda at: order.append(at) or [float(at)])
    assert order == [0, 1, 2, 2, 1, 0]
    assert samples == [[[float(at)]] * 2 for at in range(3)]


def test_contenders_are_measured_at_the_same_positions(tmp_path):
    config = zoo.retnet(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_heads=2)
    save_model(RetNet(config), tmp_path)
    for name, size in (("retnet", config), ("transformer", matching_transformer(config))):
        reached = []
        marks = along.measure_along(
            name, tmp_path, [64, 128, 192], device="cpu", on_mark=reached.append
        )
        assert [mark.position for mark in marks] == reached == [64, 128, 192]
        assert [mark.state for mark in marks] == [state_bytes(size, n) for n in reached]
        assert all(mark.seconds > 0 and mark.resident > 10**7 for mark in marks)


def test_a_process_that_dies_is_one_line(tmp_path, monkeypatch):
    def dies(*_):
        raise Unavailable("its process was killed by signal 9")

    config = zoo.retnet(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_heads=1)
    save_model(RetNet(config), tmp_path)
    monkeypatch.setattr(along, "_decode", dies)
    with pytest.raises(InputError, match=r"^retnet could not be .* signal 9$"):
        along.measure_along("retnet", tmp_path, [64], device="cpu", on_mark=print)
