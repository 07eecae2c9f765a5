"""Slots and recordings, by a recording that runs the step again; real ones are in `tests/gpu`."""

import gc
import weakref

import pytest
import torch
import zoo
from torch import Tensor

from retentive.decoding import graphs
from retentive.decoding.graphs import GraphRunner, Step, bucket, suits
from retentive.decoding.recurrent import RecurrentRunner
from retentive.decoding.runner import runner
from retentive.models.checkpoint import load_state
from retentive.models.fingerprint import fingerprint
from retentive.models.retnet import RetNet
from retentive.models.state import RetNetState

CONFIG = zoo.retnet(vocab_size=31, hidden_size=32, num_hidden_layers=2, num_heads=2)


@pytest.fixture
def model() -> RetNet:
    model = RetNet(CONFIG)
    model.init_weights(seed=0)
    return model.double().eval()


class Recorder:
    """In the place of `graphs.record`. As that does, it steps while it records."""

    def __init__(self):
        self.recordings = 0

    def __call__(self, step: Step) -> Step:
        self.recordings += 1
        for _ in range(graphs.WARM_UP + 1):
            logits = step()

        def replay() -> Tensor:  # into the same memory, as a graph does
            return logits.copy_(step())

        return replay


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(sum(shape)))


def read(model: RetNet, rows: int) -> RetNetState:
    with torch.inference_mode():
        return model(random_tokens(rows, 9))[1]


def follows(replayed: GraphRunner, eager: RecurrentRunner, steps: int = 3) -> None:
    """Both take the same tokens, and agree in logits and state."""
    for tokens in random_tokens(steps, replayed.rows):
        logits = replayed.step(tokens)
        torch.testing.assert_close(logits, eager.step(tokens))
    assert torch.equal(replayed.state.positions, eager.state.positions)
    for one, other in zip(replayed.state.layers, eager.state.layers, strict=True):
        torch.testing.assert_close(one["S"], other["S"])


def test_buckets():
    assert [bucket(rows) for rows in (1, 2, 3, 4, 5, 8, 9, 64)] == [1, 2, 4, 4, 8, 8, 16, 64]


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_replayed_steps_are_steps(model, rows):
    state, recorder = read(model, rows), Recorder()
    before = state.clone()
    follows(GraphRunner(model, state, recorder), RecurrentRunner(model, state.clone()))
    assert recorder.recordings == 1
    assert torch.equal(state.positions, before.positions)  # it stays as it was
    assert torch.equal(state.layers[0]["S"], before.layers[0]["S"])


def test_runners_of_one_model_take_turns(model):
    """Of different sizes, the larger after the smaller: its slots are made while those are held."""
    recorder = Recorder()
    states = read(model, 2), read(model, 3), read(model, 9)
    pairs = [(GraphRunner(model, s, recorder), RecurrentRunner(model, s.clone())) for s in states]
    for _ in range(2):
        for replayed, eager in pairs:
            follows(replayed, eager)
    assert recorder.recordings == len({2, 4, 16}) + len({2, 4})  # the slots for 16 began anew


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0]])
def test_goes_on_from_a_runner_of_the_same_model(model, rows):
    """Whose state is in the slots that are filled."""
    recorder, state = Recorder(), read(model, 3)
    before, eager = GraphRunner(model, state, recorder), RecurrentRunner(model, state.clone())
    follows(before, eager)
    held = before.state if len(rows) == 3 else before.state.select(rows)
    again = GraphRunner(model, held, recorder)
    before.step(torch.tensor([3, 2, 1]))  # does not touch it
    follows(again, RecurrentRunner(model, eager.state.select(rows)))


def test_a_size_is_recorded_once(model):
    recorder = Recorder()
    for rows in (4, 3, 4, 2, 1, 2):
        follows(
            GraphRunner(model, read(model, rows), recorder),
            RecurrentRunner(model, read(model, rows).clone()),
        )
    assert recorder.recordings == len({4, 2, 1})


def test_a_state_in_slots_is_saved_like_any_other(model, tmp_path):
    """Three rows of four: not all of their memory."""
    replayed = GraphRunner(model, read(model, 3), Recorder())
    replayed.step(torch.tensor([1, 2, 3]))
    replayed.state.save(tmp_path / "state", fingerprint=fingerprint(model))
    again, _, _ = load_state(tmp_path / "state", model)
    assert torch.equal(again.layers[1]["S"], replayed.state.layers[1]["S"])


def test_a_logit_is_not_written_over_by_the_next_step(model):
    replayed = GraphRunner(model, read(model, 2), Recorder())
    first = replayed.step(torch.tensor([1, 2]))
    kept = first.clone()
    replayed.step(torch.tensor([3, 4]))
    assert torch.equal(first, kept)


def test_slots_beyond_the_batch_are_not_active(model):
    GraphRunner(model, read(model, 3), Recorder()).step(torch.tensor([1, 2, 3]))
    assert graphs.slots_of(model, 4).active.tolist() == [True, True, True, False]


def test_weights_that_moved_are_recorded_anew(model):
    recorder = Recorder()
    GraphRunner(model, read(model, 2), recorder).step(torch.tensor([1, 2]))
    model.float().double()
    follows(
        GraphRunner(model, read(model, 2), recorder), RecurrentRunner(model, read(model, 2).clone())
    )
    assert recorder.recordings == 2


def test_slots_go_with_their_model():
    model = RetNet(CONFIG)
    GraphRunner(model, model.init_state(1), Recorder()).step(torch.tensor([1]))
    gone = weakref.ref(graphs.slots_of(model, 1))
    del model
    gc.collect()
    assert gone() is None


def test_what_a_runner_is(model, monkeypatch):
    """On a GPU that has the kernels; nothing is recorded for no rows."""
    monkeypatch.setattr(graphs, "suits", lambda model: True)
    monkeypatch.setattr(graphs, "record", Recorder())
    assert isinstance(runner(model, read(model, 2)), GraphRunner)
    assert isinstance(runner(model, read(model, 2).select([])), RecurrentRunner)


def test_on_a_cpu_steps_are_not_recorded(model):
    assert not suits(model)
    assert isinstance(runner(model, model.init_state(1)), RecurrentRunner)
