"""Results as tables in the terminal."""

import sys
from collections.abc import Sequence
from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING, Any

from retentive.bench import results
from retentive.bench.results import Result, Row

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from retentive.bench.options import Common


NOT_RUN = "not run"
MS = "ms"


def console() -> "Console":
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 110, highlight=False)


def show(result: Result, title: str, *, of: str, rows: Sequence[Row] | None = None) -> None:
    """A row for each case and contender, of the whole result or of some `rows`.

    Times are over that of the first contender of a case, which is ours.
    """
    console().print(_table(result, title, of, result.rows if rows is None else rows))


def _table(result: Result, title: str, of: str, rows: Sequence[Row]) -> "Table":
    from rich.table import Table

    table = Table(title=f"{title}, {result.options['dtype']}", title_justify="left")
    columns, groups = grid(rows, of)
    for name in columns:
        left = name == "contender"
        table.add_column(name, justify="left" if left else "right", no_wrap=not left)
    for group in groups:
        for cells in group:
            table.add_row(*cells, style="dim" if NOT_RUN in cells else None)
        table.add_section()
    return table


def grid(rows: Sequence[Row], of: str) -> tuple[list[str], list[list[list[str]]]]:
    """The names of the columns, and for each case its rows of cells, as many or fewer."""
    sizes = list(rows[0].case) if rows else []
    shown = [*([MS] if of != "GEMM rate" else []), "spread", f"of {of}"]
    if any(row.roofline for row in rows):
        shown = [MS, *shown, "of roofline", "of floor"]
    groups = []
    for _, group in groupby(rows, key=lambda row: list(row.case.values())):
        beside = list(group)
        case = [f"{v:,}" if isinstance(v, int) else v for v in beside[0].case.values()]
        cells = [_cells(row, beside, shown) for row in beside]
        groups.append([[*(case if n == 0 else [""] * len(case)), *c] for n, c in enumerate(cells)])
    return [*sizes, "contender", "tokens/s", *shown, "memory", "time"], groups


def _cells(row: Row, rows: Sequence[Row], shown: Sequence[str]) -> list[str]:
    """From the contender on; of one that did not run its name only: the reason is told below."""
    chunk = f", C {row.chunk_size}" if row.chunk_size else ""
    if row.error is not None:
        return [row.contender, NOT_RUN]
    low, high = row.spread
    milliseconds = 1000 * row.seconds
    can_be = {
        MS: f"{milliseconds:.1f}" if milliseconds >= 10 else f"{milliseconds:.3g}",
        "spread": f"{low:.2f}-{high:.2f}",
        "of roofline": _of(row, "design"),
        "of floor": _of(row, "floor"),
    }
    return [
        f"{row.contender}: {row.form}{chunk}",
        f"{row.rate:,.0f}" if row.rate >= 100 else f"{row.rate:.1f}",
        *(can_be.get(name, f"{row.fraction:.0%}") for name in shown),
        size(row.added_bytes),
        versus(row, rows),
    ]


def _of(row: Row, name: str) -> str:
    """How much of its time a roofline allows."""
    return f"{row.roofline[name] / row.seconds:.0%}" if row.roofline else ""


def who(rows: Sequence[Row]) -> list[str]:
    """Version and parameters of each contender; of those that did not run where and why."""
    lines = {}
    for row in rows:
        if row.error is None:
            count = f", {row.parameters / 1e6:.1f}M parameters" if row.parameters else ""
            lines[f"{row.contender} {row.version}{count}"] = []
    for row in rows:
        if row.error is not None:
            case = " ".join(f"{name} {value:,}" for name, value in row.case.items())
            lines.setdefault(f"{row.contender} not run: {row.error}", []).append(case)
    cases = len({str(row.case) for row in rows})
    return [
        f"{line} ({'; '.join(where)})" if 0 < len(where) < cases else line
        for line, where in lines.items()
    ]


def show_along(along: dict[str, Any]) -> None:
    """What a token costs along one text."""
    from rich.table import Table

    if "error" in along:
        console().print(f"one text, token by token, not measured: {along['error']}")
        return
    title = f"one text, token by token: {along['contender']}"
    table = Table(title=title, title_justify="left")
    for name in ("tokens read", "ms a token", "state", "resident"):
        table.add_column(name, justify="right")
    for at, seconds in zip(along["measures"], along["seconds"], strict=True):
        cells = f"{at['position']:,}", f"{1000 * seconds:.2f}"
        table.add_row(*cells, size(at["state"]), size(at["resident"]))
    out, drift = console(), along["drift"]
    out.print(table)
    out.print(
        "Every token was decoded; the times are of blocks from the states on the way, in turn. "
        f"Last quarter over first: time x{drift['seconds']:.3f}, memory x{drift['resident']:.3f}"
    )


def versus(row: Row, rows: Sequence[Row]) -> str:
    """Its time over that of the first row of the case that ran."""
    first = next(other for other in rows if other.error is None)
    return "" if row is first else f"{row.seconds / first.seconds:.2f}x"


def size(count: float) -> str:
    if count < 2**20:
        return f"{count / 2**10:.0f} KiB"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def conditions(result: Result) -> str:
    told, options = result.machine, result.options
    return (
        f"Medians of {options['rounds']} rounds in which the contenders take turns; spread: the "
        "fastest and slowest round over the median. Memory: the peak of its process above its "
        "start. Time: over that of the first.\n"
        f"{told['gpu'] or told['processor']}, {options['threads']} threads, torch {told['torch']}; "
        f"{limits(result)}"
    )


def limits(result: Result) -> str:
    names = ("gemm_flops", "linear_flops", "stream_bytes")
    gemm, linear, stream = (result.limits[name] for name in names)
    if not gemm:
        return "limits not measured"
    return (
        f"GEMM {_rates(gemm)} GFLOP/s, in our linear layers {_rates(linear)}; "
        f"reading memory {_rates(stream)} GB/s"
    )


def _rates(samples: Sequence[float]) -> str:
    """`180 (150-190)`: the median, which is what rows are compared with, and how far it varied."""
    return f"{median(samples) / 1e9:,.0f} ({min(samples) / 1e9:,.0f}-{max(samples) / 1e9:,.0f})"


def finish(result: Result, options: "Common", old: Result | None) -> None:
    """What is said below a benchmark's tables: how and by whom, and against an older run."""
    out = console()
    out.print(conditions(result))
    for line in who(result.rows):
        out.print(f"  {line}")
    if old is not None:
        show_comparison(old, result)


def show_comparison(old: Result, new: Result) -> None:
    from rich.table import Table

    table = Table(title="against the older run", title_justify="left")
    for name in ("case", "contender", "now", "times as fast"):
        left = name in ("case", "contender")
        table.add_column(name, justify="left" if left else "right")
    for row, ratio in results.compare(old, new):
        case = ", ".join(f"{name} {value}" for name, value in row.case.items())
        table.add_row(case, row.contender, f"{row.rate:,.0f} tokens/s", f"{ratio:.2f}x")
    out = console()
    out.print(table)
    out.print("Each as the fraction of its own run's limit: GEMM rate, or memory read.")
    changed = [
        f"{name} {before} before, {now} now"
        for name, before, now in _different(_conditions(old), _conditions(new))
    ]
    if changed:
        out.print("; ".join(changed))


def _conditions(result: Result) -> dict[str, Any]:
    chosen = {name: result.options.get(name) for name in ("model", "dtype", "threads")}
    return {**result.machine, **chosen}


def _different(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(k, old.get(k), new[k]) for k in new if old.get(k) != new[k]]
