"""The demo's three pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from retentive.bench.decode import Measure

_COLORS = {"RetNet": "tab:blue", "Transformer": "tab:orange"}


Points = Sequence[tuple[float, float]]  # x and y of each


def learning_curve(
    training: Points, sampled: Points, held_out: float, xz: float, path: Path
) -> None:
    """Bits per byte over millions of tokens read.

    training: of each update; sampled: of some held-out files during the run; held_out: of all of
    them at its end, beside what xz needs for them.
    """
    figure, axes = _figure("What a byte of Python costs", "training tokens read, millions")
    color = _COLORS["RetNet"]
    axes.plot(*_means(training, 100), color=color, alpha=0.4, linewidth=1, label="in training")
    if sampled:
        axes.plot(*zip(*sampled, strict=True), ".-", color=color, label="some held-out files")
    end, name = training[-1][0], f"all held-out files: {held_out:.2f}"
    axes.plot(end, held_out, "*", color=color, markersize=11, label=name)
    axes.axhline(
        xz, color="0.35", linestyle="--", linewidth=1, label=f"xz -9 on all of them: {xz:.2f}"
    )
    axes.set(ylabel="bits per byte", ylim=(0, None))
    axes.legend(frameon=False, loc="lower left")
    figure.savefig(path)


def _means(points: Points, count: int) -> tuple[list[float], list[float]]:
    """x and y of at most `count` points: means of neighbours."""
    size = -(-len(points) // count)
    groups = [points[at : at + size] for at in range(0, len(points), size)]
    return [fmean(x for x, _ in g) for g in groups], [fmean(y for _, y in g) for g in groups]


def time_per_token(measures: Mapping[str, Sequence[Measure]], path: Path) -> None:
    figure, axes = _figure("Time of the next token", "tokens read so far")
    times = {name: [1000 * at.seconds for at in points] for name, points in measures.items()}
    _lines(axes, measures, times, "{:.1f} ms")
    axes.set(ylabel="milliseconds a token", ylim=(0, None))
    figure.savefig(path)


def memory(measures: Mapping[str, Sequence[Measure]], path: Path) -> None:
    """What each process holds beyond its first measure; the weights and libraries are in that."""
    figure, axes = _figure("Memory that decoding adds", "tokens read so far")
    grown = {
        name: [(at.resident - points[0].resident) / 2**20 for at in points]
        for name, points in measures.items()
    }
    _lines(axes, measures, grown, "{:.0f} MiB")
    bottom, top = axes.get_ylim()
    axes.set(ylabel="resident memory above the start, MiB", ylim=(bottom, max(top, 10)))
    figure.savefig(path)


def _figure(title: str, over: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left")
    axes.set_xlabel(over)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    return figure, axes


def _lines(
    axes: Axes,
    measures: Mapping[str, Sequence[Measure]],
    values: Mapping[str, Sequence[float]],
    unit: str,
) -> None:
    """A line a contender, its name and last value at its end: above it, where there is room."""
    low, high = sorted(y[-1] for y in values.values())
    crowded = high - low < 0.15 * max(map(max, values.values()))
    for name, y in values.items():
        x = [at.position for at in measures[name]]
        axes.plot(x, y, ".-", color=_COLORS[name], markersize=4, linewidth=1.2)
        offset, va = (-7, "top") if crowded and y[-1] == low else (7, "bottom")
        axes.annotate(
            f"{name}: {unit.format(y[-1])}",
            (x[-1], y[-1]),
            (0, offset),
            textcoords="offset points",
            color=_COLORS[name],
            ha="right",
            va=va,
        )
    axes.margins(y=0.15)
