"""Fitting a benchmark into a budget of seconds, by estimates that improve with measurements."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
CAUTION = 1.5  # times the estimate of a cell of whose kind none was measured yet
MARGIN = 1.15  # of another


@dataclass(frozen=True)
class Cell:
    """One case of a benchmark with all its contenders, and an estimate of its seconds."""

    kind: str
    sizes: dict[str, int]
    seconds: float

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {value:,}" for name, value in self.sizes.items())
        return f"{self.kind} {sizes}"


@dataclass
class Budget:
    """Seconds to spend, None for any number; `reserve` are for tables and figures."""

    seconds: float | None
    reserve: float = 8.0
    clock: Callable[[], float] = time.monotonic
    _began: float = field(init=False)
    _slower: dict[str, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._began = self.clock()

    def estimate(self, cell: Cell) -> float:
        """Its seconds, scaled as the slowest of its kind was to its first guess."""
        if cell.kind not in self._slower:
            return CAUTION * cell.seconds
        return MARGIN * self._slower[cell.kind] * cell.seconds

    def fits(self, cell: Cell) -> bool:
        if self.seconds is None:
            return True
        spent = self.clock() - self._began
        return spent + self.estimate(cell) + self.reserve <= self.seconds

    def taken(self, cells: Iterable[Cell], left_out: list[tuple[Cell, float]]) -> Iterator[Cell]:
        """The cells that fit, in their order; the time that each takes improves the estimates.

        The others go to `left_out` with their estimates; smaller ones may still fit.
        """
        for cell in cells:
            if not self.fits(cell):
                left_out.append((cell, self.estimate(cell)))
                continue
            began = self.clock()
            yield cell
            ratio = (self.clock() - began) / cell.seconds
            self._slower[cell.kind] = max(ratio, self._slower.get(cell.kind, 0.0))


def extremes_first(values: Sequence[T]) -> list[T]:
    """The last, the first, then from the ends inwards: of a line first its ends."""
    order, rest = [], list(values)
    while rest:
        order.append(rest.pop(-1 if len(order) % 2 == 0 else 0))
    return order


def in_turn(*lists: Sequence[T]) -> list[T]:
    """The first of each list, the second of each, and so on; nothing twice."""
    longest = max(map(len, lists))
    mixed = [x[at] for at in range(longest) for x in lists if at < len(x)]
    return list({repr(item): item for item in mixed}.values())
