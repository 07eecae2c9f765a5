"""Results as figures that read like the paper's Figure 6."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from retentive.bench.results import Result, Row
from retentive.reports.figures import (
    BLUE,
    BROWN,
    GREEN,
    INK,
    MAGENTA,
    MARKERS,
    ORANGE,
    PALETTE,
    SKY,
    by_decades,
    by_doublings,
    figure,
    legend_below,
)

Value = Callable[[Row], float]
_STYLES = {  # colour and dashes: our RetNet blue, Transformers orange and brown, the peers' RetNets
    "retnet": (BLUE, "-"),
    "retnet-eager": (BLUE, "--"),
    "retnet-triton": (SKY, "-"),
    "retnet-parallel": (SKY, "--"),
    "retnet-recurrent": (SKY, "-."),
    "retnet-reference": (SKY, ":"),
    "attention": (ORANGE, "-"),
    "transformer": (ORANGE, "-"),
    "transformer-gqa": (ORANGE, "--"),
    "transformer-gqa8": (ORANGE, "-."),
    "transformer-math": (ORANGE, ":"),
    "llama": (BROWN, "-"),
    "llama-static": (BROWN, "-."),
    "llama-gqa": (BROWN, "--"),
    "llama-gqa-static": (BROWN, ":"),
    "yet-another-retnet": (GREEN, "-"),
    "yet-another-retnet-readme": (GREEN, "--"),
    "torchscale": (MAGENTA, "-"),
    "flash-linear-attention": (INK, "-"),
    "flash-linear-attention-recurrent": (INK, "--"),
}
_AXES = {
    "tokens": "tokens of a sequence",
    "context": "tokens read before",
    "batch": "batch, sequences",
}


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
    """Memory, throughput and latency over context and batch; time along one sequence."""
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
        along_sequence(result.more["along"], Path(f"{stem}-along"))


def by_length(result: Result, stem: Path | None, title: str) -> None:
    """Throughput and memory over the tokens of a sequence."""
    rows = [row for row in result.rows if row.error is None and "tokens" in row.case]
    shown = [panel for panel in PANELS if panel[0] != "latency"]
    dims = list(dict.fromkeys(row.case.get("key_dim") for row in rows))
    if stem is None:
        return
    for K in dims:
        these = [row for row in rows if row.case.get("key_dim") == K]
        if len(dims) == 1:
            panels(these, "tokens", title, stem, shown)
        else:
            panels(these, "tokens", f"{title}, K {K}", stem.with_name(f"{stem.name}-{K}"), shown)


def panels(
    rows: Sequence[Row],
    over: str,
    title: str,
    stem: Path,
    shown: Sequence[tuple[str, str, Value]],
) -> None:
    """A panel for each of `shown`, over a size of the cases; both axes are logarithmic."""
    names = list(dict.fromkeys(row.contender for row in rows))
    with figure(stem, title, size=(4.4 * len(shown), 4.6)) as drawn:
        grid = drawn.subplots(1, len(shown), squeeze=False)[0]
        for axes, (heading, unit, value) in zip(grid, shown, strict=True):
            for number, name in enumerate(names):
                color, dashes = _STYLES.get(name, (PALETTE[number % len(PALETTE)], "-"))
                points = sorted((int(r.case[over]), value(r)) for r in rows if r.contender == name)
                axes.plot(
                    *zip(*points, strict=True),
                    marker=MARKERS[number % len(MARKERS)],
                    linestyle=dashes,
                    color=color,
                    label=name,
                )
            axes.set_title(heading)
            axes.set(xlabel=_AXES[over], ylabel=unit)
            by_doublings(axes, sorted({int(row.case[over]) for row in rows}))
            by_decades(axes)
        legend_below(drawn)


def along_sequence(along: dict[str, Any], stem: Path) -> None:
    """Time of a token and memory of the process over the tokens read."""
    positions = [mark["position"] for mark in along["measures"]]
    times = [1000 * seconds for seconds in along["seconds"]]
    resident = [mark["resident"] / 2**20 for mark in along["measures"]]
    shown = (("time", "ms a token", times), ("memory of the process", "MiB", resident))
    title = f"One sequence of {positions[-1]:,} tokens, decoded by {along['contender']}"
    with figure(stem, title, size=(9.0, 3.6)) as drawn:
        for axes, (heading, unit, values) in zip(drawn.subplots(1, 2), shown, strict=True):
            axes.plot(positions, values, "o-")
            axes.set(xlabel="tokens read", ylabel=unit, ylim=(0, 1.3 * max(values)))
            by_doublings(axes, [2**n for n in range(7, positions[-1].bit_length())][::2])
            axes.set_title(heading)
