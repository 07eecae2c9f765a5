"""The axis that the figures of evaluations share: distances, with the half-lives of the heads."""

from collections.abc import Sequence
from math import isinf
from typing import Any

from retentive.reports.figures import GUIDE, count


def by_distance(panels: Sequence[Any], what: str, half_lives: Sequence[float]) -> None:
    """Doublings along x of panels one below the other; half-lives of heads as dotted lines.

    `what` names the distances.
    """
    shown = [tokens for tokens in half_lives if not isinf(tokens)]
    for axes in panels:
        axes.set_xscale("log", base=2)
        low, high = axes.get_xlim()
        for tokens in shown:
            axes.axvline(tokens, color=GUIDE, linestyle=":", linewidth=1, zorder=0)
        axes.set_xlim(low, high)  # whatever the longest half-life is
    lowest = panels[-1]
    lowest.xaxis.set_major_formatter(lambda x, _: count(x))
    note = " (dotted: half-lives of the heads)" if shown else ""
    lowest.set_xlabel(f"{what}{note}")
