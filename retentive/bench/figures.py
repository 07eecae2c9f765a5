"""Results as pictures (PNG and SVG) that read like the paper's Figure 6."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from retentive.bench.results import Result, Row

Value = Callable[[Row], float]
# Ours in blues, what has a cache of keys and values in oranges, other RetNets in greens.
_COLORS = {
    "retnet": "#1f4fa3",
    "retnet-eager": "#6f9fe0",
    "retnet-parallel": "#8fb4ea",
    "retnet-recurrent": "#b0c9f0",
    "retnet-triton": "#0b2a66",
    "retnet-reference": "#9aa7bd",
    "attention": "#d9690f",
    "transformer": "#d9690f",
    "transformer-gqa": "#f0a35e",
    "transformer-gqa8": "#f7c998",
    "transformer-math": "#7a5a3a",
    "llama": "#a3260f",
    "llama-gqa": "#e07a6a",
    "yet-another-retnet": "#1b7a43",
    "yet-another-retnet-readme": "#7cc49a",
    "torchscale": "#7a9a1b",
    "flash-linear-attention": "#5d3fa0",
    "flash-linear-attention-recurrent": "#a890d8",
}
_AXES = {
    "tokens": "tokens of a sequence",
    "context": "tokens read before",
    "batch": "batch, sequences",
}
_MARKERS = "osD^vP*X<>hp"


def milliseconds(row: Row) -> float:
    return 1000 * row.seconds


def gibibytes(row: Row) -> float:
    return row.added_bytes / 2**30


def rate(row: Row) -> float:
    return row.rate


PANELS: tuple[tuple[str, str, Value], ...] = (
    ("memory", "GiB above the start", gibibytes),
    ("throughput", "tokens/s", rate),
    ("latency", "ms a step", milliseconds),
)


def decode(result: Result, stem: Path | None) -> None:
    """Memory, throughput and latency over the context, and over the batch; time along a text."""
    if stem is None:
        return
    rows = [row for row in result.rows if row.error is None and "context" in row.case]
    for over, fixed in (("context", "batch"), ("batch", "context")):
        for value in sorted({row.case[fixed] for row in rows}, key=int):
            these = [row for row in rows if row.case[fixed] == value]
            if len({row.case[over] for row in these}) > 1:
                title = f"Decoding, {fixed} {value:,}"
                panels(these, over, title, Path(f"{stem}-{over}-{fixed}-{value}"), PANELS)
    if "samples" in result.more.get("along", {}):
        along_text(result.more["along"], Path(f"{stem}-along"))


def by_length(result: Result, stem: Path | None, title: str) -> None:
    """Throughput and memory over the tokens of a sequence."""
    rows = [row for row in result.rows if row.error is None and "tokens" in row.case]
    what = [panel for panel in PANELS if panel[0] != "latency"]
    dims = list(dict.fromkeys(row.case.get("key_dim") for row in rows))
    if stem is None:
        return
    for K in dims:
        these = [row for row in rows if row.case.get("key_dim") == K]
        if len(dims) == 1:
            panels(these, "tokens", title, stem, what)
        else:
            panels(these, "tokens", f"{title}, K {K}", stem.with_name(f"{stem.name}-{K}"), what)


def panels(
    rows: Sequence[Row],
    over: str,
    title: str,
    stem: Path,
    what: Sequence[tuple[str, str, Value]],
) -> None:
    """A panel for each of `what`, over a size of the cases; both axes grow by doublings."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(what), 4.4), dpi=150, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    names = list(dict.fromkeys(row.contender for row in rows))
    for axes, (heading, unit, value) in zip(
        figure.subplots(1, len(what), squeeze=False)[0], what, strict=True
    ):
        for number, name in enumerate(names):
            points = sorted((int(r.case[over]), value(r)) for r in rows if r.contender == name)
            axes.plot(
                *zip(*points, strict=True),
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=5,
                linewidth=2.2 if name == "retnet" else 1.2,
                color=_COLORS.get(name),
                label=name,
            )
        axes.set_title(heading, loc="left", size=10)
        axes.set(xlabel=_AXES[over], ylabel=unit)
        _by_doublings(axes, sorted({int(row.case[over]) for row in rows}))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    save(figure, stem)


def along_text(along: dict[str, Any], stem: Path) -> None:
    """Time of a token and memory of the process over the tokens read."""
    from matplotlib.figure import Figure

    positions = [at["position"] for at in along["measures"]]
    figure = Figure(figsize=(8.4, 3.4), dpi=150, layout="constrained")
    title = f"One text of {positions[-1]:,} tokens, decoded by {along['contender']}"
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    times = [1000 * seconds for seconds in along["seconds"]]
    resident = [at["resident"] / 2**20 for at in along["measures"]]
    drawn = (("time", "ms a token", times), ("memory of the process", "MiB", resident))
    for axes, (heading, unit, values) in zip(figure.subplots(1, 2), drawn, strict=True):
        axes.plot(positions, values, "o-", markersize=4, color=_COLORS["retnet"])
        axes.set(xlabel="tokens read", ylabel=unit, ylim=(0, 1.3 * max(values)))
        axes.set_xscale("log", base=2)
        ticks = positions[:: -max(1, len(positions) // 5)]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.set_title(heading, loc="left", size=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    save(figure, stem)


def _by_doublings(axes: Any, ticks: Sequence[int]) -> None:
    """At least a decade high, so that small differences look small."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    low, high = axes.get_ylim()
    spare = max(1.0, (10 * low / high) ** 0.5)
    axes.set_ylim(low / spare, high * spare)
    axes.yaxis.set_major_locator(_decades())
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:.2g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)


def _decades() -> Any:
    from matplotlib.ticker import LogLocator

    return LogLocator(base=10, subs=(1, 2, 5), numticks=12)


def save(figure: Any, stem: Path) -> None:
    for kind in ("png", "svg"):
        figure.savefig(stem.with_name(f"{stem.name}.{kind}"))
