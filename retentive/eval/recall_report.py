"""The report of `retentive eval recall`: JSON, a table, a figure as PNG and SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple, Self

from retentive.eval.figures import by_distance
from retentive.reports.figures import MARKERS, PALETTE, figure
from retentive.reports.tables import console, new_table

FORMAT = 1


class Answer(NamedTuple):
    """Of one sample at one distance, means over its questions."""

    chosen: float
    """The right candidate was the likeliest."""
    greedy: float
    """Each of its tokens was the likeliest of the vocabulary."""
    nats: float
    """-log p of the right candidate among the candidates."""

    @classmethod
    def of(cls, questions: Sequence[tuple[list[float], bool, int]]) -> Self:
        """Of (log-likelihoods of the candidates, right one greedy, place of the right one)."""
        chosen, greedy, nats = [], [], []
        for found, was_greedy, right in questions:
            best = max(found)
            chosen.append(float(found[right] == best))
            greedy.append(float(was_greedy))
            total = best + math.log(sum(math.exp(x - best) for x in found))
            nats.append(total - found[right])
        return cls(fmean(chosen), fmean(greedy), fmean(nats))


class Score(NamedTuple):
    """A mean over samples and its standard error, None of a single one."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(fmean(values), error)

    def show(self) -> str:
        error = "" if self.error is None else f" ± {self.error:.3f}"
        return f"{self.mean:.3f}{error}"


@dataclass
class Report:
    """Of a model whose heads have these half-lives, asked over `distances`."""

    model: str
    dtype: str
    samples: int
    pairs: int
    seed: int
    distances: list[int]
    half_lives: list[float]
    chances: dict[str, float]
    """Of a right guess among the candidates, by probe."""
    answers: dict[str, list[list[Answer]]] = field(default_factory=dict)
    """By probe, sample and distance."""

    def scores(self, probe: str, what: str) -> list[Score]:
        """By distance."""
        by_distance = zip(*self.answers[probe], strict=True)
        return [Score.of([getattr(answer, what) for answer in column]) for column in by_distance]

    def to_dict(self) -> dict[str, Any]:
        return {
            "evaluation": "recall",
            "format": FORMAT,
            "model": self.model,
            "dtype": self.dtype,
            "samples": self.samples,
            "pairs": self.pairs,
            "seed": self.seed,
            "half_lives": self._half_lives(),
            "distances": self.distances,
            "probes": {probe: self._probe(probe) for probe in self.answers},
        }

    def _half_lives(self) -> list[float | None]:
        """Of each head; None for one that never forgets."""
        return [None if math.isinf(tokens) else tokens for tokens in self.half_lives]

    def _probe(self, probe: str) -> dict[str, Any]:
        columns = {what: self.scores(probe, what) for what in Answer._fields}
        return {
            "chance": self.chances[probe],
            **{what: [score._asdict() for score in scores] for what, scores in columns.items()},
        }

    def show(self, folder: Path) -> None:
        out = console()
        title = f"recall over distance, {self.samples} texts of each probe"
        names = ["tokens\nbetween"]
        if self.half_lives:
            names.append("heads that hold half\n(slowest holds)")
        for probe in self.answers:
            names += [f"{probe}\nof candidates", f"{probe}\nof all tokens"]
        table = new_table(title, names)
        columns = [
            [score.show() for score in self.scores(probe, what)]
            for probe in self.answers
            for what in ("chosen", "greedy")
        ]
        for row, distance in enumerate(self.distances):
            held = [self._held(distance)] if self.half_lives else []
            table.add_row(f"{distance:,}", *held, *(column[row] for column in columns))
        out.print(table)
        chances = ", ".join(f"{probe} {self.chances[probe]:.3g}" for probe in self.answers)
        out.print(
            f"The share of right answers ± standard error. Chance among candidates: {chances}."
        )
        if self.half_lives:
            lives = ", ".join(f"{tokens:,.0f}" for tokens in self.half_lives)
            out.print(f"Half-lives of the heads, in tokens: {lives}.")
        out.print(f"all of it in {folder}")

    def _held(self, distance: int) -> str:
        """How many heads still hold half of what they read so long ago, and the slowest's part."""
        beyond = sum(tokens >= distance for tokens in self.half_lives)
        slowest = 0.5 ** (distance / max(self.half_lives))
        return f"{beyond} of {len(self.half_lives)} ({slowest:.2g})"

    def draw(self, folder: Path) -> None:
        """As recall.png and .svg: a line a probe, its chance dashed."""
        with figure(folder / "recall", "Recall over distance") as drawn:
            axes = drawn.subplots()
            for number, probe in enumerate(self.answers):
                scores = self.scores(probe, "chosen")
                color = PALETTE[number]
                axes.errorbar(
                    self.distances,
                    [score.mean for score in scores],
                    yerr=[score.error or 0.0 for score in scores],
                    marker=MARKERS[number],
                    capsize=2,
                    color=color,
                    label=probe,
                )
                axes.axhline(self.chances[probe], color=color, linestyle="--", linewidth=1)
            by_distance([axes], "tokens between", self.half_lives)
            axes.set(ylabel="right answers (dashed: chance)", ylim=(-0.03, 1.03))
            axes.legend()
