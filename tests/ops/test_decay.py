"""The decay rules and the row scale against exact rational arithmetic."""

import math
from fractions import Fraction

import pytest
import torch

from retentive.errors import InputError
from retentive.ops.decay import half_life, log_decay, row_scale


@pytest.mark.parametrize("heads", [1, 5, 8, 40, 200])
def test_power_rule_keeps_every_digit_of_gamma_near_one(heads):
    for h, value in enumerate(log_decay(heads, "power").tolist()):
        x = Fraction(1, 2 ** (5 + h))  # log(1 - x) by its series, exact rationals
        series = -sum((x**n / n for n in range(1, 40)), start=Fraction(0))
        assert value == pytest.approx(float(series), rel=1e-15)


def test_linspace_rule_runs_from_one_in_32_to_one_in_512():
    rates = log_decay(6, "linspace").exp()
    assert rates[0].item() == pytest.approx(1 - 1 / 32, rel=1e-14)
    assert rates[-1].item() == pytest.approx(1 - 1 / 512, rel=1e-14)
    steps = torch.log(1 - rates).diff()
    assert torch.allclose(steps, steps[0].expand(5), rtol=1e-10)


def test_the_two_rules_coincide_at_five_heads_and_only_there():
    assert torch.allclose(log_decay(5, "power"), log_decay(5, "linspace"), rtol=1e-12)
    assert not torch.allclose(log_decay(6, "power"), log_decay(6, "linspace"), rtol=1e-2)


def test_explicit_decays_are_taken_as_they_are():
    assert log_decay(3, [-0.5, -1e-9, 0.0]).tolist() == [-0.5, -1e-9, 0.0]


@pytest.mark.parametrize(
    ("rule", "words"),
    [("powr", "did you mean 'power'"), ([-0.1], "for 3 heads"), ([0.1, -1, -1], "not ≤ 0")],
)
def test_bad_rules_are_refused(rule, words):
    with pytest.raises(InputError, match=words):
        log_decay(3, rule)


def test_row_scale_is_the_root_of_the_geometric_sum():
    rates = torch.tensor([math.log(31 / 32), math.log1p(-(2.0**-40)), 0.0], dtype=torch.float64)
    positions = torch.tensor([0, 1, 7, 100])
    scale = row_scale(rates, positions)
    for row, n in enumerate(positions.tolist()):
        for head, gamma in enumerate([Fraction(31, 32), 1 - Fraction(1, 2**40), Fraction(1)]):
            total = sum(gamma**i for i in range(n + 1))
            assert scale[row, head].item() == pytest.approx(float(total) ** -0.5, rel=1e-14)


def test_half_life():
    assert half_life(torch.tensor([math.log(0.5) / 10, 0.0], dtype=torch.float64)).tolist() == [
        10.0,
        math.inf,
    ]
