"""What the figures of all evaluations share: an axis of distances, and the heads' half-lives."""

from collections.abc import Sequence
from math import isinf
from pathlib import Path
from typing import Any


def new_figure(title: str, height: float = 4.2) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, height), dpi=150, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    return figure


def by_distance(panels: Sequence[Any], what: str, half_lives: Sequence[float]) -> None:
    """Doublings along x of panels one below the other; the heads' half-lives as dotted lines."""
    shown = [tokens for tokens in half_lives if not isinf(tokens)]
    for axes in panels:
        axes.set_xscale("log", base=2)
        low, high = axes.get_xlim()
        for tokens in shown:
            axes.axvline(tokens, color="gray", linestyle=":", linewidth=1, zorder=0)
        axes.set_xlim(low, high)  # whatever the longest half-life is
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    lowest = panels[-1]
    lowest.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    lowest.tick_params(axis="x", rotation=30)
    note = " (dotted: half-lives of the heads)" if shown else ""
    lowest.set_xlabel(f"{what}{note}")


def save(figure: Any, stem: Path) -> None:
    for kind in ("png", "svg"):
        figure.savefig(stem.with_name(f"{stem.name}.{kind}"))
