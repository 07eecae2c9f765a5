"""A budget kept by a clock made up here."""

from retentive.bench.planning import CAUTION, MARGIN, Budget, Cell, extremes_first, in_turn


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def measured(budget, cells, clock, slower):
    """Which cells are taken, each of which takes `slower` times its estimate; which are not."""
    taken, left_out = [], []
    for cell in budget.taken(cells, left_out):
        clock.now += slower * cell.seconds
        taken.append(cell)
    return taken, left_out


def test_without_a_budget_everything_is_taken():
    clock = Clock()
    cells = [Cell("train", {"tokens": n}, 1000.0) for n in range(5)]
    assert measured(Budget(None, clock=clock), cells, clock, 9) == (cells, [])


def test_it_ends_within_the_budget_whatever_the_first_guess_was():
    for slower in (0.3, 1.0, 1.4):
        clock = Clock()
        cells = [Cell("decode", {"context": n}, 10.0) for n in range(50)]
        taken, left_out = measured(Budget(100, clock=clock), cells, clock, slower)
        assert clock.now - 100 <= 100 and taken == cells[: len(taken)]
        assert [cell for cell, _ in left_out] == cells[len(taken) :]
    assert len(taken) == 6  # of 14 s each; 84 s and the 16.1 s of the next are too many


def test_estimates_follow_what_was_measured_of_their_kind():
    clock = Clock()
    budget = Budget(1000, clock=clock)
    cell, other = Cell("decode", {}, 10.0), Cell("train", {}, 10.0)
    assert budget.estimate(cell) == 10 * CAUTION
    measured(budget, [cell], clock, slower=3)
    assert budget.estimate(cell) == 30 * MARGIN and budget.estimate(other) == 10 * CAUTION
    measured(budget, [cell], clock, slower=1)
    assert budget.estimate(cell) == 30 * MARGIN  # the slowest counts


def test_what_is_too_large_is_left_out_and_smaller_ones_still_come():
    clock = Clock()
    cells = [Cell("train", {"tokens": n}, float(n)) for n in (10, 500, 5)]
    taken, left_out = measured(Budget(100, clock=clock), cells, clock, 1)
    assert [cell.seconds for cell in taken] == [10, 5]
    assert str(left_out[0][0]) == "train tokens 500"


def test_order():
    assert extremes_first([1, 2, 3, 4, 5]) == [5, 1, 4, 2, 3]
    assert in_turn([1, 2, 3], [4], [2, 5]) == [1, 4, 2, 5, 3]
