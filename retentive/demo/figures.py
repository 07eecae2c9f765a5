"""The demo's three figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from retentive.bench.along import Mark
from retentive.reports.figures import BLUE, GUIDE, MARKERS, ORANGE, figure, label_ends

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE = (8.4, 4.0)  # with room for labels at the right
_COLORS = {"RetNet": BLUE, "Transformer": ORANGE}


Points = Sequence[tuple[float, float]]  # x and y of each


def learning_curve(
    training: Points, sampled: Points, held_out: float, xz: float, stem: Path
) -> None:
    """Bits per byte over millions of tokens read.

    training   of each update
    sampled    of some held-out files during the run
    held_out   of all held-out files at its end
    xz         of the same files, compressed
    """
    with figure(stem, "Bits per byte of Python's own sources") as drawn:
        axes = drawn.subplots()
        axes.plot(*_means(training, 100), color=BLUE, alpha=0.4, linewidth=1, label="in training")
        if sampled:
            x, y = zip(*sampled, strict=True)
            axes.plot(x, y, ".-", color=BLUE, label="some held-out files")
        end, name = training[-1][0], f"all held-out files: {held_out:.2f}"
        axes.plot(end, held_out, "*", color=BLUE, markersize=14, label=name)
        axes.axhline(xz, color=GUIDE, linestyle="--", label=f"xz -9 on all of them: {xz:.2f}")
        axes.set(xlabel="training tokens read, millions", ylabel="bits per byte", ylim=(0, None))
        axes.legend(loc="upper right")


def _means(points: Points, count: int) -> tuple[list[float], list[float]]:
    """x and y of at most `count` points: means of neighbours."""
    size = -(-len(points) // count)
    groups = [points[at : at + size] for at in range(0, len(points), size)]
    return [fmean(x for x, _ in g) for g in groups], [fmean(y for _, y in g) for g in groups]


def time_per_token(marks: Mapping[str, Sequence[Mark]], stem: Path) -> None:
    times = {name: [1000 * mark.seconds for mark in along] for name, along in marks.items()}
    with figure(stem, "Time of the next token", WIDE) as drawn:
        axes = drawn.subplots()
        axes.set(ylabel="ms a token", ylim=(0, 1.05 * max(map(max, times.values()))))
        _lines(axes, marks, times, "{:.1f} ms")


def memory(marks: Mapping[str, Sequence[Mark]], stem: Path) -> None:
    """The growth of each process since its first mark; weights and libraries are older."""
    grown = {
        name: [(mark.resident - along[0].resident) / 2**20 for mark in along]
        for name, along in marks.items()
    }
    with figure(stem, "Memory that decoding adds", WIDE) as drawn:
        axes = drawn.subplots()
        most = max(10, *map(max, grown.values()))
        least = min(0, *map(min, grown.values()))
        axes.set(ylabel="MiB above the start", ylim=(least - 0.05 * most, 1.05 * most))
        _lines(axes, marks, grown, "{:,.0f} MiB")


def _lines(
    axes: "Axes",
    marks: Mapping[str, Sequence[Mark]],
    values: Mapping[str, Sequence[float]],
    unit: str,
) -> None:
    """A line a contender over the positions, its name and last value in a `unit` at its end."""
    for number, (name, y) in enumerate(values.items()):
        axes.plot(
            [mark.position for mark in marks[name]],
            y,
            color=_COLORS[name],
            marker=MARKERS[number],
            markersize=4,
            label=f"{name}: {unit.format(max(0.0, y[-1]))}",
        )
    axes.set_xlabel("tokens read before")
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    label_ends(axes)
