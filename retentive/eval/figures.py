"""What the figures of all evaluations share: an axis of distances, and the heads' half-lives."""

from math import isinf
from pathlib import Path
from typing import Any

from retentive.models.config import RetNetConfig
from retentive.ops.decay import half_life, log_decay


def half_lives(config: RetNetConfig) -> list[float]:
    """Of each head, in tokens; infinity where nothing decays."""
    return half_life(log_decay(config.num_heads, config.decay)).tolist()


def new_figure(title: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    return figure


def by_distance(axes: Any, what: str, config: RetNetConfig | None) -> None:
    """Doublings along x; a RetNet's half-lives as dotted lines."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.tick_params(axis="x", rotation=30)
    low, high = axes.get_xlim()
    shown = [t for t in half_lives(config) if not isinf(t)] if config is not None else []
    for tokens in shown:
        axes.axvline(tokens, color="gray", linestyle=":", linewidth=1, zorder=0)
    axes.set_xlim(low, high)  # whatever the longest half-life is
    note = " (dotted: half-lives of the heads)" if shown else ""
    axes.set_xlabel(f"{what}{note}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)


def save(figure: Any, stem: Path) -> None:
    for kind in ("png", "svg"):
        figure.savefig(stem.with_name(f"{stem.name}.{kind}"))
