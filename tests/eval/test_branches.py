"""Log-likelihoods of branches against plain forward passes, in float64."""

import random

import pytest
import torch

from retentive.eval import branches
from retentive.eval.branches import Request, Scorer, after, read, tree
from retentive.eval.scores import log_likelihoods

EXACT = 1e-12  # some hundred roundings of float64, relative


def reference(model, context, continuation) -> tuple[float, bool]:
    tokens = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        log_p = model(tokens[:, :-1])[0][0].log_softmax(-1)[len(context) - 1 :]
    targets = torch.tensor(continuation)
    found = log_p.gather(1, targets[:, None]).sum()
    return float(found), bool((log_p.argmax(-1) == targets).all())


def draw(dice: random.Random, count: int) -> list[int]:
    return dice.choices(range(1, 300), k=count)


def assorted() -> list[tuple[list[int], list[int]]]:
    """A prompt for all, contexts for some, choices that begin alike, one-token choices, twins."""
    dice = random.Random(0)
    prompt, begin = draw(dice, 40), draw(dice, 20)
    found = []
    for length in (1, 5, 30):
        context = prompt + draw(dice, length)
        found += [(context, draw(dice, n)) for n in (1, 1, 4, 9)]
        found += [(context, begin + draw(dice, n)) for n in (1, 3)]
        found.append((context, begin))
    found += [(draw(dice, n), draw(dice, 3)) for n in (1, 2, 17)]
    found += [(prompt, prompt[:5]), found[0], (prompt[:30], prompt[30:])]
    return found


@pytest.mark.parametrize(
    ("share", "batch_size", "at_once"),
    [(True, 1, 4096), (True, 5, 4096), (True, 5, 8), (False, 5, 4096), (False, 1, 8)],
)
def test_log_likelihoods_are_those_of_plain_passes(model, monkeypatch, share, batch_size, at_once):
    monkeypatch.setattr(branches, "AT_ONCE", at_once)
    pairs = assorted()
    requests, finished = [Request(*pair) for pair in pairs], []
    Scorer(model, batch_size, share=share).finish(requests, on_finished=finished.append)
    assert sorted(map(id, finished)) == sorted(map(id, requests))
    for request, pair in zip(requests, pairs, strict=True):
        expected, greedy = reference(model, *pair)
        assert request.log_likelihood == pytest.approx(expected, rel=EXACT)
        assert request.greedy == greedy


def test_the_likeliest_continuation_is_greedy(model):
    context = draw(random.Random(1), 20)
    continuation: list[int] = []
    for _ in range(4):
        with torch.no_grad():
            logits, _ = model(torch.tensor([context + continuation]))
        continuation.append(int(logits[0, -1].argmax()))
    right = Request(context, continuation)
    wrong = Request(context, [*continuation[:3], (continuation[3] + 1) % 300])
    Scorer(model, 2).finish([right, wrong])
    assert right.greedy and not wrong.greedy


def test_requests_go_on_from_the_rows_of_a_state(model):
    dice = random.Random(2)
    past = [draw(dice, n) for n in (1, 30, 11)]
    state = after(model, past, model.init_state(3))
    asked = [(row, draw(dice, 20), draw(dice, 3)) for row in (2, 0, 2, 1)]
    for _ in range(2):  # the state stays as it was
        requests = [Request(context, choice, row) for row, context, choice in asked]
        Scorer(model, 2).finish(requests, state)
        for request, (row, context, choice) in zip(requests, asked, strict=True):
            expected, _ = reference(model, past[row] + context, choice)
            assert request.log_likelihood == pytest.approx(expected, rel=EXACT)


def read_tokens(monkeypatch, model, requests, **options) -> int:
    """How many tokens the model is given."""
    count, hidden = 0, type(model).hidden

    def counting(self, tokens, *args, **kwargs):
        nonlocal count
        count += tokens.numel()
        return hidden(self, tokens, *args, **kwargs)

    monkeypatch.setattr(type(model), "hidden", counting)
    Scorer(model, 8, **options).finish(requests)
    monkeypatch.undo()
    return count


def test_what_is_shared_is_read_once(model, monkeypatch):
    dice = random.Random(3)
    prompt = draw(dice, 100)
    contexts = [prompt + draw(dice, 50) for _ in range(4)]
    pairs = [(context, draw(dice, 5)) for context in contexts for _ in range(4)]
    shared = read_tokens(monkeypatch, model, [Request(*pair) for pair in pairs])
    alone = read_tokens(monkeypatch, model, [Request(*pair) for pair in pairs], share=False)
    assert shared == 100 + 4 * 50 + 16 * 4
    assert alone == 16 * (150 + 4)


def test_a_tree_holds_each_request_from_its_beginning_to_its_end():
    requests = [Request(*pair) for pair in assorted()]
    requests.sort(key=lambda request: request.inputs)
    reached = dict.fromkeys(requests, 0)

    def walk(nodes, start):
        for node in nodes:
            assert node.start == start < node.stop
            assert len({request.inputs[: node.stop] for request in node.requests}) == 1
            for request in node.requests:
                reached[request] = node.stop
            walk(node.children, node.stop)

    walk(tree(requests), 0)
    assert all(stop == len(request.inputs) for request, stop in reached.items())


@pytest.mark.parametrize("last", [True, False])
def test_ragged_rows_are_read_in_segments(model, monkeypatch, last):
    monkeypatch.setattr(branches, "AT_ONCE", 12)
    rows = [draw(random.Random(row), n) for row, n in enumerate((9, 1, 5))]
    state = model.init_state(3)
    seen = {}
    for h, at, lengths, begins, after_segment in read(model, rows, state, last=last):
        for row, (begin, length) in enumerate(zip(begins, lengths, strict=True)):
            for i in range(length):
                seen[row, at + i] = h[begin + i]
        state = after_segment
    assert len(seen) == 15
    for row, tokens in enumerate(rows):
        with torch.no_grad():
            expected, final = model.hidden(torch.tensor([tokens]))
        for i, h in enumerate(expected[0]):
            torch.testing.assert_close(seen[row, i], h, rtol=1e-10, atol=1e-12)
        if not last:
            assert int(state.positions[row]) == int(final.positions[0]) == len(tokens)


def test_several_targets_may_follow_one_state(model, monkeypatch):
    monkeypatch.setattr("retentive.eval.scores.chunk_rows", lambda *args: 2)
    h = torch.randn(5, 32, dtype=torch.float64, generator=torch.manual_seed(0))
    places, targets = torch.tensor([4, 0, 4, 2, 3]), torch.tensor([7, 8, 9, 0, 1])
    found, likeliest = log_likelihoods(model, h, places, targets)
    log_p = model.head(h).log_softmax(-1)[places]
    torch.testing.assert_close(found, log_p.gather(1, targets[:, None])[:, 0].detach())
    assert likeliest.tolist() == (log_p.argmax(-1) == targets).tolist()
