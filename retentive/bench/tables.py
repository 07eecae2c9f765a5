"""Results as tables in the terminal."""

from collections.abc import Sequence
from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING, Any

from retentive.bench import results
from retentive.bench.results import Result, Row
from retentive.reports.tables import console, new_table, size

if TYPE_CHECKING:
    from retentive.bench.options import Common


NOT_RUN = "not run"
MS = "ms"


def show(result: Result, title: str, *, of: str, rows: Sequence[Row] | None = None) -> None:
    """A row for each case and contender, of the whole result or of some `rows`.

    `of` is the limit that their fractions are of. Times are over that of the first contender of a
    case, which is ours.
    """
    columns, groups = grid(result.rows if rows is None else rows, of)
    table = new_table(f"{title}, {result.options['dtype']}", columns, words=["contender"])
    for group in groups:
        for cells in group:
            table.add_row(*cells, style="dim" if NOT_RUN in cells else None)
        table.add_section()
    console().print(table)


def grid(rows: Sequence[Row], of: str) -> tuple[list[str], list[list[list[str]]]]:
    """The names of the columns, and the rows of cells of each case, as long or shorter."""
    sizes = list(rows[0].case) if rows else []
    shown = [*([MS] if of != "GEMM rate" else []), "spread", f"of {of}"]
    if any(row.roofline for row in rows):
        shown = [MS, *shown, "of roofline", "of floor"]
    groups = []
    for _, group in groupby(rows, key=lambda row: list(row.case.values())):
        together = list(group)
        case = [f"{v:,}" if isinstance(v, int) else v for v in together[0].case.values()]
        cells = [_cells(row, together, shown) for row in together]
        groups.append([[*(case if n == 0 else [""] * len(case)), *c] for n, c in enumerate(cells)])
    return [*sizes, "contender", "tokens/s", *shown, "memory", "time"], groups


def _cells(row: Row, rows: Sequence[Row], shown: Sequence[str]) -> list[str]:
    """From the contender on; only its name where it did not run: the reason is below the table."""
    chunk = f", C {row.chunk_size}" if row.chunk_size else ""
    if row.error is not None:
        return [row.contender, NOT_RUN]
    low, high = row.spread
    milliseconds = 1000 * row.seconds
    columns = {
        MS: f"{milliseconds:.1f}" if milliseconds >= 10 else f"{milliseconds:.3g}",
        "spread": f"{low:.2f}-{high:.2f}",
        "of roofline": _of(row, "design"),
        "of floor": _of(row, "floor"),
    }
    return [
        f"{row.contender}: {row.form}{chunk}",
        f"{row.rate:,.0f}" if row.rate >= 100 else f"{row.rate:.1f}",
        *(columns.get(name, f"{row.fraction:.0%}") for name in shown),
        size(row.added_bytes),
        versus(row, rows),
    ]


def _of(row: Row, name: str) -> str:
    """The least time by a roofline over its time."""
    return f"{row.roofline[name] / row.seconds:.0%}" if row.roofline else ""


def contenders(rows: Sequence[Row]) -> list[str]:
    """Version and parameters of each contender; of those that did not run the reason and cases."""
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
    """The cost of a token along one sequence."""
    out = console()
    if "error" in along:
        out.print(f"one sequence, token by token, not measured: {along['error']}")
        return
    title = f"one sequence, token by token: {along['contender']}"
    table = new_table(title, ["tokens read", "ms a token", "state", "resident"])
    for mark, seconds in zip(along["measures"], along["seconds"], strict=True):
        cells = f"{mark['position']:,}", f"{1000 * seconds:.2f}"
        table.add_row(*cells, size(mark["state"]), size(mark["resident"]))
    out.print(table)
    drift = along["drift"]
    out.print(
        "Times are of blocks of tokens from the states kept along the sequence, in turn. "
        f"Last quarter over first: time x{drift['seconds']:.3f}, memory x{drift['resident']:.3f}"
    )


def versus(row: Row, rows: Sequence[Row]) -> str:
    """Its time over that of the first row of the case that ran."""
    first = next(other for other in rows if other.error is None)
    return "" if row is first else f"{row.seconds / first.seconds:.2f}x"


def conditions(result: Result) -> str:
    """How the rows were measured, and on what machine."""
    machine, options = result.machine, result.options
    return (
        f"Medians of {options['rounds']} rounds in which the contenders take turns; spread: the "
        "fastest and slowest round over the median. Memory: the peak of its process above its "
        "start. Time: over that of the first.\n"
        f"{machine['gpu'] or machine['processor']}, {options['threads']} threads, "
        f"torch {machine['torch']}; {limits(result)}"
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
    """`180 (150-190)`: the median, which rows are compared with, and the range."""
    return f"{median(samples) / 1e9:,.0f} ({min(samples) / 1e9:,.0f}-{max(samples) / 1e9:,.0f})"


def finish(result: Result, options: "Common", old: Result | None) -> None:
    """The lines below a benchmark's tables: conditions, contenders, an older run in comparison."""
    out = console()
    out.print(conditions(result))
    for line in contenders(result.rows):
        out.print(f"  {line}")
    if old is not None:
        show_comparison(old, result)


def show_comparison(old: Result, new: Result) -> None:
    columns = ["case", "contender", "now", "times as fast"]
    table = new_table("against the older run", columns, words=["case", "contender"])
    for row, ratio in results.compare(old, new):
        case = ", ".join(f"{name} {value}" for name, value in row.case.items())
        table.add_row(case, row.contender, f"{row.rate:,.0f} tokens/s", f"{ratio:.2f}x")
    out = console()
    out.print(table)
    out.print("Each as a fraction of its own run's limit: GEMM rate, or memory read.")
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
