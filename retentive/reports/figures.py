"""The style of all figures: fonts, colours, axes; and how a figure is saved.

    with figure(Path("runs/memory"), "Memory of a sequence") as drawn:
        axes = drawn.subplots()
        ...

writes runs/memory.png and runs/memory.svg. Letters stay legible where a page shows the figure at
half its size. The colours differ for colour-blind readers, too, and each stands out from white
(`tests/reports`); lines differ by their markers as well.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, MAGENTA = "#0B57D0", "#D97706", "#055D39", "#B11E7E"
SKY, BROWN, INK = "#129CD8", "#804900", "#222222"
PALETTE = (BLUE, ORANGE, GREEN, MAGENTA, SKY, BROWN, INK)
"""Blue first: it is RetNet's wherever it stands beside others, orange is the Transformer's."""
GUIDE = "#777777"  # of lines that are no data
MARKERS = "osD^vP*X<>hp"

PANEL = (7.0, 4.0)  # inches
DPI = 150
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 12,
    "figure.titlesize": 14,
    "figure.titleweight": "bold",
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.wspace": 0.05,  # between a panel and the next one's labels
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "legend.fontsize": 12,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    ),
    "svg.hashsalt": "retentive",  # the same figure is the same file
}


@contextmanager
def figure(
    stem: Path,
    title: str = "",
    size: tuple[float, float] = PANEL,
    kinds: Sequence[str] = ("png", "svg"),
) -> Iterator["Figure"]:
    """An empty figure of `size` inches, saved to `stem` with each ending after the block.

    Each file is written aside and renamed: a reader finds the old figure or the new one.
    """
    import matplotlib.style
    from cycler import cycler
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", {**STYLE, "axes.prop_cycle": cycler(color=PALETTE)}]):
        drawn = Figure(figsize=size, dpi=DPI, layout="constrained")
        if title:
            drawn.suptitle(title, x=0.01, ha="left")
        yield drawn
        for kind in kinds:
            path = stem.with_name(f"{stem.name}.{kind}")
            aside = path.with_name(f".{path.name}.tmp")
            # Without a date, for the same reason as the salt
            drawn.savefig(aside, format=kind, metadata={"Date": None} if kind == "svg" else None)
            os.replace(aside, path)


def count(tokens: float) -> str:
    """2048 as 2k, as sizes of contexts are called; other numbers in full."""
    whole = round(tokens)
    return f"{whole // 1024:,}k" if whole and whole % 1024 == 0 else f"{whole:,}"


def by_doublings(axes: "Axes", ticks: Sequence[float]) -> None:
    """A logarithmic x axis with a number at each of `ticks`."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [count(tick) for tick in ticks])
    axes.minorticks_off()


def by_decades(axes: "Axes") -> None:
    """A logarithmic y axis, at least a decade high, so that small differences look small."""
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    spare = max(1.0, (10 * low / high) ** 0.5)
    axes.set_ylim(low / spare, high * spare)
    few = axes.get_ylim()[1] < 300 * axes.get_ylim()[0]
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if few else (1,), numticks=12))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:.2g}")
    axes.minorticks_off()


def legend_below(drawn: "Figure", columns: int = 4) -> None:
    """One legend for all panels, of the lines of the first."""
    handles, labels = drawn.axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)))


def label_ends(axes: "Axes") -> None:
    """The label of each line right of its last point, in its colour, none over another.

    Call it last: the places follow from the limits of the axes.
    """
    drawn = axes.get_figure(root=True)
    assert drawn is not None
    drawn.draw_without_rendering()  # settles where the axes are
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    ends: list[Any] = [line.get_xydata()[-1] for line in lines]  # pyright: ignore[reportIndexIssue]
    heights = [axes.transData.transform(end)[1] * 72 / drawn.dpi for end in ends]  # in points
    for line, end, height, place in zip(lines, ends, heights, _spread(heights), strict=True):
        axes.annotate(
            str(line.get_label()),
            end,
            (8, place - height),
            textcoords="offset points",
            color=line.get_color(),
            va="center",
        )


def _spread(heights: Sequence[float], gap: float = 1.25 * STYLE["font.size"]) -> list[float]:
    """Heights near these, in the same order, of which no two are closer than `gap`."""
    order, places = sorted(range(len(heights)), key=lambda n: heights[n]), list(heights)
    for _ in range(100):  # neighbours that touch push each other away, until all have room
        for low, high in pairwise(order):
            overlap = max(0.0, gap - (places[high] - places[low]))
            places[low] -= overlap / 2
            places[high] += overlap / 2
    return places
