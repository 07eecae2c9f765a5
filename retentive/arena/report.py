"""The report of `retentive bench quality`: JSON, a table, a figure as PNG and SVG."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from retentive.arena.plan import VARIANTS, Job, Outcome, Plan, model_options
from retentive.bench.figures import save
from retentive.bench.results import machine
from retentive.bench.tables import console
from retentive.data.dataset import Corpus
from retentive.devices import resolve_device
from retentive.io.atomic import write_text
from retentive.models.counts import parameters

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMAT = 1
BASE = "retnet"  # what the others are held against
_COLORS = {name: f"C{n}" for n, name in enumerate(VARIANTS)}


@dataclass(frozen=True)
class Spread:
    """Mean and sample deviation over seeds; no deviation of a single one."""

    mean: float
    std: float | None
    count: int

    @classmethod
    def of(cls, values: list[float]) -> "Spread | None":
        if not values:
            return None
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, len(values))

    def show(self, sign: str = "") -> str:
        deviation = "" if self.std is None else f" ± {self.std:.3f}"
        return f"{self.mean:{sign}.3f}{deviation}"


@dataclass(frozen=True)
class Summary:
    """A variant at its best learning rate, as far as its runs have come."""

    name: str
    label: str
    parameters: int
    lr: float | None
    at_edge: bool
    """The best rate is the lowest or the highest of several: outside there may be a better one."""
    valid_loss: Spread | None
    bits_per_byte: Spread | None
    carried_loss: Spread | None
    against_base: Spread | None
    """Loss above the RetNet's, seed by seed: the same text in the same order."""
    losses: dict[int, float]
    """By seed."""
    diverged: int
    """Runs at this rate that did."""
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
        """As quality.png and .svg, if a run has come to an end alive."""
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
        plan, ran, losses = self.plan, self._at_best(name), self._losses(name)
        lr, rates = plan.best_rate(name, self.outcomes), plan.learning_rates

        def spread(what: str) -> Spread | None:
            values = [getattr(outcome, what) for outcome in ran.values()]
            return Spread.of([value for value in values if value is not None])

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
            against_base=None if name == BASE else Spread.of(above),
            losses=losses,
            diverged=len(ran) - len(losses),
            sweep=plan.sweep(name, self.outcomes),
        )

    def _at_best(self, name: str) -> dict[int, Outcome]:
        """By seed."""
        lr = self.plan.best_rate(name, self.outcomes)
        return {
            job.seed: outcome
            for job, outcome in self.outcomes.items()
            if (job.variant, job.lr) == (name, lr)
        }

    def _losses(self, name: str) -> dict[int, float]:
        """By seed, of those that did not diverge."""
        losses = {seed: outcome.valid_loss for seed, outcome in self._at_best(name).items()}
        return {seed: loss for seed, loss in losses.items() if loss is not None}

    def heading(self) -> str:
        plan = self.plan
        tokens = plan.steps * plan.recipe.batch_size * plan.recipe.seq_len
        return (
            f"{self.size}: {tokens / 1e6:.3g}M tokens in rows of {plan.recipe.seq_len}, "
            f"{tokens / self.corpus.train.num_tokens:.2g} times the corpus"
        )

    def show(self, folder: Path) -> None:
        from rich.table import Table

        table = Table(title=self.heading(), title_justify="left")
        table.add_column("", no_wrap=True)
        for title in (
            "parameters",
            "learning\nrate",
            "nats a token",
            "bits per\nbyte",
            f"above {VARIANTS[BASE].label}",
            "carried\nstate",
            "seeds",
        ):
            table.add_column(title, justify="right")
        summaries = self.summaries()
        for summary in summaries:
            table.add_row(*_cells(summary))
        out = console()
        out.print(table)
        out.print(
            "Over all held-out text, means over the seeds ± their deviation. Rows begin with an "
            "empty state, as in training.\n"
            "Carried state: nats a token where a RetNet reads on from row to row."
        )
        if any(summary.at_edge for summary in summaries):
            out.print("* at an end of the rates tried: beyond it --learning-rates may find better")
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
    """How many there are of them, if any has come through."""
    if summary.lr is None:
        return "diverged" if summary.sweep else ""
    lost = f", {summary.diverged} diverged" if summary.diverged else ""
    return f"{len(summary.losses)}{lost}"


def draw(summaries: list[Summary], heading: str, stem: Path) -> None:
    """The seeds of each variant, and its sweep if there was one; to `stem`.png and .svg."""
    from matplotlib.figure import Figure

    swept = any(len(s.sweep) > 1 for s in summaries)
    widths = (3, 2) if swept else (1,)
    size = (5 * len(widths), 1.6 + 0.45 * len(summaries))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    _draw_seeds(panels[0], summaries)
    if swept:
        _draw_sweep(panels[1], summaries)
    figure.suptitle(heading, fontsize=10, x=0.01, ha="left")
    save(figure, stem)


def _draw_seeds(axes: "Axes", summaries: list[Summary]) -> None:
    """A dot a seed, a stroke at their mean."""
    for y, s in enumerate(summaries):
        losses = list(s.losses.values())
        assert s.valid_loss is not None
        axes.plot(losses, [y] * len(losses), "o", color=_COLORS[s.name], alpha=0.6, markersize=6)
        axes.plot(s.valid_loss.mean, y, "|", color=_COLORS[s.name], markersize=18, mew=2)
        axes.annotate(
            f"{s.valid_loss.mean:.3f}",
            (max(losses), y),
            (8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
        if s.name == BASE:
            axes.axvline(s.valid_loss.mean, color=_COLORS[s.name], alpha=0.4, linewidth=1)
    axes.set_yticks(range(len(summaries)), [s.label for s in summaries])
    axes.invert_yaxis()
    axes.margins(x=0.2, y=0.08)  # room for the numbers
    axes.set_xlabel("validation loss, nats a token (a dot a seed)")
    _plain(axes, "x")


def _draw_sweep(axes: "Axes", summaries: list[Summary]) -> None:
    for s in summaries:
        points = [(lr, loss) for lr, loss in s.sweep.items() if loss is not None]
        axes.plot(*zip(*points, strict=True), ".-", color=_COLORS[s.name], linewidth=1.2)
    rates = sorted({lr for s in summaries for lr in s.sweep})
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set_xlabel("learning rate (first seed; colours as beside)")
    axes.set_ylabel("validation loss")
    _plain(axes, "y")


def _plain(axes: "Axes", grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, alpha=0.3)  # pyright: ignore[reportArgumentType]
