"""The demo's three pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from retentive.demo.decode import Measure

_COLORS = {"RetNet": "tab:blue", "Transformer": "tab:orange"}


def learning_curve(
    training: Sequence[tuple[float, float]],
    validation: Sequence[tuple[float, float]],
    xz: float,
    path: Path,
) -> None:
    """Bits per byte over tokens read, and the line of what xz needs for the same files."""
    figure, axes = _figure("What a byte of Python costs", "training tokens read, millions")
    axes.plot(*zip(*training, strict=True), color=_COLORS["RetNet"], alpha=0.25, linewidth=0.8)
    axes.plot(*zip(*validation, strict=True), "o-", color=_COLORS["RetNet"], markersize=4)
    axes.axhline(xz, color="0.35", linestyle="--", linewidth=1)
    last, bits = validation[-1]
    above, below = ((0, 7), "bottom"), ((0, -7), "top")
    (model_at, model_va), (xz_at, xz_va) = (above, below) if bits > xz else (below, above)
    held_out = f"RetNet on the held-out files: {bits:.2f}"
    axes.annotate(held_out, (last, bits), model_at, color=_COLORS["RetNet"], **_beside(model_va))
    axes.annotate(f"xz -9 on the same files: {xz:.2f}", (last, xz), xz_at, **_beside(xz_va))
    axes.set(ylabel="bits per byte", ylim=(0, min(8, 1.05 * max(bits for _, bits in training))))
    figure.savefig(path)


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
    """A line a contender, name and last value at its end: above it for the highest, else below."""
    highest = max(values, key=lambda name: values[name][-1])
    for name, y in values.items():
        x = [at.position for at in measures[name]]
        axes.plot(x, y, ".-", color=_COLORS[name], markersize=4, linewidth=1.2)
        label = f"{name}: {unit.format(y[-1])}"
        offset, va = (7, "bottom") if name == highest else (-7, "top")
        place = (x[-1], y[-1])
        axes.annotate(label, place, (0, offset), color=_COLORS[name], **_beside(va))
    axes.margins(y=0.15)


def _beside(va: str) -> dict[str, Any]:
    return {"textcoords": "offset points", "ha": "right", "va": va}
