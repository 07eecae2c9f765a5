"""`choose` against the distribution written out by hand, and the rows' independence."""

import math
from dataclasses import replace

import pytest
import torch

from retentive.errors import InputError
from retentive.inference.sampling import Sampler, Sampling, choose

PLAIN = Sampling(temperature=1.0, top_p=1.0)


def distribution(logits, sampling, seen=None):
    """The probability of each token, read off `choose` with evenly spaced draws."""
    draws = 20_000
    uniform = ((torch.arange(draws) + 0.5) / draws)[:, None]
    seen = torch.zeros_like(logits, dtype=torch.bool) if seen is None else seen
    tokens = choose(logits.expand(draws, -1), sampling, seen.expand(draws, -1), uniform)
    return torch.bincount(tokens, minlength=logits.shape[-1]) / draws


@pytest.fixture
def logits():
    return torch.tensor([2.0, -1.0, 0.5, 1.9, -3.0, 0.0])


def test_without_filters_it_draws_from_the_softmax(logits):
    expected = (logits / 0.7).softmax(-1)
    torch.testing.assert_close(
        distribution(logits, replace(PLAIN, temperature=0.7)), expected, atol=2e-4, rtol=0
    )


def test_greedy_takes_the_likeliest(logits):
    assert choose(
        logits[None],
        Sampling(temperature=0),
        torch.zeros(1, 6, dtype=torch.bool),
        torch.zeros(1, 1),
    ).tolist() == [0]


def test_a_tiny_temperature_does_not_overflow(logits):
    assert distribution(logits * 1e4, replace(PLAIN, temperature=1e-30)).tolist()[0] == 1


@pytest.mark.parametrize("k", [1, 2, 4, 100])
def test_top_k(logits, k):
    kept = logits.topk(min(k, 6)).indices
    expected = torch.zeros(6)
    expected[kept] = logits[kept].softmax(-1)
    torch.testing.assert_close(
        distribution(logits, replace(PLAIN, top_k=k)), expected, atol=2e-4, rtol=0
    )


@pytest.mark.parametrize(("top_p", "kept"), [(0.01, [0]), (0.5, [0, 3]), (0.85, [0, 3, 2])])
def test_top_p_keeps_the_fewest_that_hold_the_mass(logits, top_p, kept):
    expected = torch.zeros(6)
    expected[kept] = logits[kept].softmax(-1)
    torch.testing.assert_close(
        distribution(logits, replace(PLAIN, top_p=top_p)), expected, atol=2e-4, rtol=0
    )


def test_top_p_beyond_the_first_candidates(monkeypatch, logits):
    whole = distribution(logits, replace(PLAIN, top_p=0.9))
    monkeypatch.setattr("retentive.inference.sampling._NUCLEUS", 2)
    torch.testing.assert_close(distribution(logits, replace(PLAIN, top_p=0.9)), whole)


def test_top_p_is_of_what_top_k_left(logits):
    both = distribution(logits, replace(PLAIN, top_k=2, top_p=0.52))
    assert both.nonzero().flatten().tolist() == [0]  # softmax(2.0, 1.9)[0] = 0.525


def test_min_p_is_relative_to_the_likeliest(logits):
    probabilities = logits.softmax(-1)
    kept = probabilities >= 0.2 * probabilities.max()
    expected = torch.where(kept, probabilities, 0) / probabilities[kept].sum()
    torch.testing.assert_close(
        distribution(logits, replace(PLAIN, min_p=0.2)), expected, atol=2e-4, rtol=0
    )


def test_repetition_penalty_weakens_what_was_seen_only(logits):
    seen = torch.tensor([True, True, False, False, False, False])
    weakened = logits.clone()
    weakened[0], weakened[1] = 2.0 / 1.5, -1.0 * 1.5
    torch.testing.assert_close(
        distribution(logits, replace(PLAIN, repetition_penalty=1.5), seen),
        weakened.softmax(-1),
        atol=2e-4,
        rtol=0,
    )


def test_the_largest_draw_never_falls_on_a_dropped_token():
    logits = torch.randn(64, 300, generator=torch.Generator().manual_seed(0))
    uniform = torch.full((64, 1), 1 - 2**-24)
    seen = torch.zeros(64, 300, dtype=torch.bool)
    tokens = choose(logits, replace(PLAIN, min_p=0.5), seen, uniform)
    probabilities = logits.softmax(-1)
    chosen = probabilities.gather(-1, tokens[:, None]).squeeze(-1)
    assert bool((chosen >= 0.5 * probabilities.amax(-1)).all())


def drawn(sampler, logits, rows, steps=20):
    return torch.stack([sampler.draw(logits, rows) for _ in range(steps)], dim=1)


def test_a_row_does_not_depend_on_the_rows_beside_it():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(seed=7, repetition_penalty=1.3)
    device = torch.device("cpu")
    together = drawn(Sampler(sampling, 3, 50, device), logits, [0, 1, 2])
    for row in range(3):
        alone = Sampler(replace(sampling, seed=7 + row), 1, 50, device)
        assert torch.equal(drawn(alone, logits[row : row + 1], [0])[0], together[row])
    again = Sampler(sampling, 3, 50, device)
    assert torch.equal(drawn(again, logits[[2, 0]], [2, 0]), together[[2, 0]])


def test_another_seed_draws_something_else():
    logits = torch.zeros(1, 50)
    device = torch.device("cpu")
    first, second = (
        drawn(Sampler(replace(PLAIN, seed=s), 1, 50, device), logits, [0]) for s in (0, 1)
    )
    assert not torch.equal(first, second)


def test_prompt_tokens_are_penalised_too():
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=2.0), 2, 3, torch.device("cpu"))
    sampler.observe(1, [0])
    logits = torch.tensor([[1.0, 0.9, 0.0]]).expand(2, -1)
    assert sampler.draw(logits, [0, 1]).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_what_is_out_of_range_is_named(option, value):
    with pytest.raises(InputError, match=option) as raised:
        Sampling(**{option: value})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(broken):
    logits = torch.zeros(1, 5)
    logits[0, 2] = broken
    with pytest.raises(InputError, match="not finite"):
        Sampler(Sampling(), 1, 5, torch.device("cpu")).draw(logits, [0])
