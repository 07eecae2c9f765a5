"""The report of `retentive bench quality`: JSON, a table, a figure as PNG and SVG."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Self

from retentive.arena.plan import VARIANTS, Job, Outcome, Plan, model_options
from retentive.bench.results import machine
from retentive.data.dataset import Corpus
from retentive.devices import resolve_device
from retentive.io.atomic import write_text
from retentive.models.counts import parameters
from retentive.reports.figures import BLUE, MARKERS, ORANGE, PALETTE, figure
from retentive.reports.tables import console, new_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMAT = 1
BASE = "retnet"  # the others are compared with it
_COLORS = {BASE: BLUE, "transformer": ORANGE}
_COLORS |= dict(zip((name for name in VARIANTS if name not in _COLORS), PALETTE[2:], strict=False))
_MARKERS = dict(zip(VARIANTS, MARKERS, strict=False))


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds; no deviation of a single one."""

    mean: float
    std: float | None
    count: int

    @classmethod
    def from_values(cls, values: list[float]) -> Self | None:
        if not values:
            return None
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, len(values))

    def show(self, sign: str = "") -> str:
        deviation = "" if self.std is None else f" ± {self.std:.3f}"
        return f"{self.mean:{sign}.3f}{deviation}"


@dataclass(frozen=True)
class Summary:
    """A variant at its best learning rate, by the runs so far."""

    name: str
    label: str
    parameters: int
    lr: float | None
    at_edge: bool
    """The best rate is the lowest or highest of several: a better one may lie outside."""
    valid_loss: Spread | None
    bits_per_byte: Spread | None
    carried_loss: Spread | None
    against_base: Spread | None
    """Loss above the RetNet's of the same seed, which had the same batches."""
    losses: dict[int, float]
    """By seed."""
    diverged: int
    """How many runs at this rate diverged."""
    sweep: dict[float, float | None]
    """The first seed's loss by learning rate."""


@dataclass
class Report:
    plan: Plan
    corpus: Corpus
    size: str
    outcomes: dict[Job, Outcome] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """As quality.json."""
        write_text(folder / "quality.json", json.dumps(self.to_dict(), indent=1) + "\n")

    def draw(self, folder: Path) -> None:
        """As quality.png and .svg, if some run did not diverge."""
        if summaries := [s for s in self.summaries() if s.valid_loss]:
            draw(summaries, self.heading(), folder / "quality")

    def to_dict(self) -> dict[str, Any]:
        plan, corpus = self.plan, self.corpus
        given = asdict(plan)
        return {
            "benchmark": "quality",
            "format": FORMAT,
            "size": self.size,
            "plan": given | {"steps": plan.steps, "runs": plan.runs},
            "corpus": {
                "hash": corpus.hash,
                "vocab_size": corpus.vocab_size,
                "train_tokens": corpus.train.num_tokens,
                "valid_tokens": corpus.valid.num_tokens,
                "valid_bytes": corpus.valid.num_bytes,
            },
            "machine": machine(resolve_device(plan.device)),
            "variants": [asdict(summary) for summary in self.summaries()],
            "runs": [
                asdict(job) | asdict(self.outcomes[job])
                for job in plan.candidates()
                if job in self.outcomes
            ],
        }

    def summaries(self) -> list[Summary]:
        base = self._losses(BASE)
        return [self._summary(name, base) for name in self.plan.variants]

    def _summary(self, name: str, base: Mapping[int, float]) -> Summary:
        plan, outcomes, losses = self.plan, self._at_best_rate(name), self._losses(name)
        lr, rates = plan.best_rate(name, self.outcomes), plan.learning_rates

        def spread(what: str) -> Spread | None:
            values = [getattr(outcome, what) for outcome in outcomes.values()]
            return Spread.from_values([value for value in values if value is not None])

        above = [loss - base[seed] for seed, loss in losses.items() if seed in base]
        return Summary(
            name=name,
            label=VARIANTS[name].label,
            parameters=sum(
                parameters(model_options(plan.recipe, name).build(self.corpus.vocab_size)).values()
            ),
            lr=lr,
            at_edge=len(rates) > 1 and lr in (rates[0], rates[-1]),
            valid_loss=spread("valid_loss"),
            bits_per_byte=spread("bits_per_byte"),
            carried_loss=spread("carried_loss"),
            against_base=None if name == BASE else Spread.from_values(above),
            losses=losses,
            diverged=len(outcomes) - len(losses),
            sweep=plan.sweep(name, self.outcomes),
        )

    def _at_best_rate(self, name: str) -> dict[int, Outcome]:
        """By seed."""
        lr = self.plan.best_rate(name, self.outcomes)
        return {
            job.seed: outcome
            for job, outcome in self.outcomes.items()
            if (job.variant, job.lr) == (name, lr)
        }

    def _losses(self, name: str) -> dict[int, float]:
        """By seed, of those that did not diverge."""
        losses = {seed: outcome.valid_loss for seed, outcome in self._at_best_rate(name).items()}
        return {seed: loss for seed, loss in losses.items() if loss is not None}

    def heading(self) -> str:
        plan = self.plan
        tokens = plan.steps * plan.recipe.batch_size * plan.recipe.seq_len
        return (
            f"{self.size}: {tokens / 1e6:.3g}M tokens in rows of {plan.recipe.seq_len}, "
            f"{tokens / self.corpus.train.num_tokens:.2g} times the corpus"
        )

    def show(self, folder: Path) -> None:
        columns = [
            *("", "parameters", "learning\nrate", "nats a token", "bits per\nbyte"),
            *(f"above {VARIANTS[BASE].label}", "carried\nstate", "seeds"),
        ]
        table = new_table(self.heading(), columns, words=[""])
        summaries = self.summaries()
        for summary in summaries:
            table.add_row(*_cells(summary))
        out = console()
        out.print(table)
        out.print(
            "Over all held-out documents, means over the seeds ± standard deviation. Rows begin "
            "with an empty state, as in training.\n"
            "Carried state: nats a token where a RetNet carries its state from row to row."
        )
        if any(summary.at_edge for summary in summaries):
            out.print("* at an end of the rates tried: try others beyond it by --learning-rates")
        out.print(f"{len(self.outcomes)} of {self.plan.runs} runs; all of it in {folder}")


def _cells(summary: Summary) -> list[str]:
    means = [x and f"{x.mean:.3f}" for x in (summary.bits_per_byte, summary.carried_loss)]
    cells = [
        summary.label,
        f"{summary.parameters / 1e6:.2f}M",
        summary.lr and f"{summary.lr:g}{'*' if summary.at_edge else ''}",
        summary.valid_loss and summary.valid_loss.show(),
        means[0],
        summary.against_base and summary.against_base.show("+"),
        means[1],
        _seeds(summary),
    ]
    return [cell or "" for cell in cells]


def _seeds(summary: Summary) -> str:
    """The number of seeds that count, and of those that diverged."""
    if summary.lr is None:
        return "diverged" if summary.sweep else ""
    lost = f", {summary.diverged} diverged" if summary.diverged else ""
    return f"{len(summary.losses)}{lost}"


def draw(summaries: list[Summary], heading: str, stem: Path) -> None:
    """The seeds of each variant, and its sweep if there was one; to `stem`.png and .svg."""
    swept = any(len(s.sweep) > 1 for s in summaries)
    widths = (3, 2) if swept else (1,)
    size = (5.2 * len(widths), 1.8 + 0.45 * len(summaries))
    with figure(stem, heading, size) as drawn:
        panels = drawn.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
        _draw_seeds(panels[0], summaries)
        if swept:
            _draw_sweep(panels[1], summaries)


def _draw_seeds(axes: "Axes", summaries: list[Summary]) -> None:
    """A marker a seed, a stroke at their mean."""
    for y, s in enumerate(summaries):
        losses, color = list(s.losses.values()), _COLORS[s.name]
        assert s.valid_loss is not None
        axes.plot(losses, [y] * len(losses), _MARKERS[s.name], color=color, alpha=0.6)
        axes.plot(s.valid_loss.mean, y, "|", color=color, markersize=20, mew=2)
        axes.annotate(
            f"{s.valid_loss.mean:.3f}",
            (max(losses), y),
            (10, 0),
            textcoords="offset points",
            va="center",
        )
        if s.name == BASE:
            axes.axvline(s.valid_loss.mean, color=color, alpha=0.4, linewidth=1)
    axes.set_yticks(range(len(summaries)), [s.label for s in summaries])
    axes.invert_yaxis()
    axes.margins(x=0.25, y=0.08)  # room for the numbers
    axes.set_xlabel("validation loss, nats a token (a marker a seed)")
    axes.grid(False, axis="y")
    axes.grid(True, axis="x")


def _draw_sweep(axes: "Axes", summaries: list[Summary]) -> None:
    for s in summaries:
        points = [(lr, loss) for lr, loss in s.sweep.items() if loss is not None]
        axes.plot(*zip(*points, strict=True), marker=_MARKERS[s.name], color=_COLORS[s.name])
    rates = sorted({lr for s in summaries for lr in s.sweep})
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set(xlabel="learning rate (first seed; markers as left)", ylabel="validation loss")
