"""The axis that the figures of evaluations share: distances, with the half-lives of the heads."""

from collections.abc import Sequence
from math import isinf
from typing import Any

from retentive.models.config import RetNetConfig
from retentive.ops.decay import half_life, log_decay
from retentive.reports.figures import GUIDE, count


def half_lives(config: RetNetConfig) -> list[float]:
    """Of each head, in tokens; infinity where nothing decays."""
    return half_life(log_decay(config.num_heads, config.decay)).tolist()


def by_distance(panels: Sequence[Any], what: str, config: RetNetConfig | None) -> None:
    """Doublings along x of panels one below the other; a RetNet's half-lives as dotted lines.

    `what` names the distances.
    """
    shown = [t for t in half_lives(config) if not isinf(t)] if config is not None else []
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
