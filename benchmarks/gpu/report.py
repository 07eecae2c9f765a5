"""The report of `benchmarks/gpu.sh` so far: python benchmarks/gpu/report.py FOLDER OUT

FOLDER has the results of the stages, and summary.json, which says how they went; OUT gets gpu.json
and gpu.md.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from retentive.bench import tables
from retentive.bench.results import Result, Row, load
from retentive.io.atomic import write_text
from retentive.reports.tables import size

FORMAT = 1
OUTCOME = re.compile(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b")
NOT_MEASURED = "not measured"


def main(folder: Path, out: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    found = {stage["name"]: result_of(folder, stage["name"]) for stage in summary["stages"]}
    results = {name: result for name, result in found.items() if result is not None}
    tests = outcomes(folder)
    written = {
        "format": FORMAT,
        **summary,
        "tests": tests,
        "results": {name: asdict(result) for name, result in results.items()},
    }
    write_text(out / "gpu.json", json.dumps(written, indent=1) + "\n")
    write_text(out / "gpu.md", markdown(summary, tests, results))


def result_of(folder: Path, stage: str) -> Result | None:
    """The result that a benchmark has written so far; its stage begins with its name."""
    path = folder / f"{stage}.json"
    return load(path, stage.partition("-")[0]) if path.is_file() else None


def outcomes(folder: Path) -> dict[str, str]:
    """Of each test in the list: passed, failed, error, skipped, or "not run"."""
    listed = folder / "tests.txt"
    names = listed.read_text().splitlines() if listed.is_file() else []
    ended = dict.fromkeys(names, "not run")
    for log in sorted(folder.glob("tests-*.log")):
        for line in log.read_text(errors="replace").splitlines():
            if match := OUTCOME.match(line):
                ended[match[1]] = match[2].lower()
    return ended


# Markdown


def markdown(summary: dict[str, Any], tests: dict[str, str], results: dict[str, Result]) -> str:
    parts = [
        "# Measured on a GPU" if not summary["smoke"] else "# Toy sizes on a CPU: no measurement"
    ]
    if results:
        parts.append(_machine(next(iter(results.values()))))
    parts += [f"- {line}" for line in summary["missing"]]
    parts.append(_stages(summary["stages"]))
    if tests:
        parts.append(_tests(tests))
    if not summary["smoke"]:
        parts.append(_targets(results))
    for stage in summary["stages"]:
        if (result := results.get(stage["name"])) is not None:
            parts.append(_section(stage["title"], result))
    return "\n\n".join(parts) + "\n"


def _machine(result: Result) -> str:
    machine = result.machine
    names = ("torch", "cuda", "triton", "ptxas", "python", "retentive", "system")
    versions = ", ".join(f"{name} {machine[name]}" for name in names if machine.get(name))
    return f"{machine['gpu'] or machine['processor']}; {versions}"


def _stages(stages: Sequence[dict[str, Any]]) -> str:
    rows = [
        [stage["name"], stage["title"], stage["state"].splitlines()[0], f"{stage['seconds']:.0f}"]
        for stage in stages
    ]
    logs = [
        f"The end of the log of `{stage['name']}`:\n\n" + "\n".join(f"    {x}" for x in lines)
        for stage in stages
        if (lines := stage["state"].splitlines()[1:])
    ]
    return "\n\n".join([table(["stage", "title", "state", "s"], rows), *logs])


def _tests(tests: dict[str, str]) -> str:
    counts = Counter(tests.values())
    total = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    broken = [f"- {outcome}: `{name}`" for name, outcome in tests.items() if outcome in BROKEN]
    return "\n".join(["## Tests", "", total, *broken])


BROKEN = ("failed", "error")


def _section(title: str, result: Result) -> str:
    """The tables of a stage: those of the op and of its step differ in the sizes of a row."""
    parts = [f"## {title[0].upper()}{title[1:]}"]
    kinds = {tuple(row.case): row for row in result.rows}
    for kind in kinds:
        rows = [row for row in result.rows if tuple(row.case) == kind]
        columns, groups = tables.grid(rows, "memory read" if "context" in kind else "GEMM rate")
        parts.append(table(columns, [cells for group in groups for cells in group]))
    lines = [f"- {line}" for line in tables.contenders(result.rows)]
    parts.append("\n".join([tables.limits(result), "", *lines]))
    return "\n\n".join(parts)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *(_padded(row, len(columns)) for row in rows)]
    return "\n".join("| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines)


def _padded(row: Sequence[str], count: int) -> list[str]:
    return [*row, *[""] * (count - len(row))]


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


# Targets


@dataclass(frozen=True)
class Target:
    name: str
    wanted: str
    measured: Callable[[dict[str, Result]], str | None]


def _targets(results: dict[str, Result]) -> str:
    rows = [[one.name, one.wanted, one.measured(results) or NOT_MEASURED] for one in TARGETS]
    return "## Targets\n\n" + table(["", "wanted", "measured"], rows)


def _row(results: dict[str, Result], stage: str, contender: str, **case: int) -> Row | None:
    """The contender's fastest row of these sizes that ran."""
    rows = [
        row
        for row in (results[stage].rows if stage in results else [])
        if row.contender == contender
        and row.error is None
        and row.samples
        and all(row.case.get(name) == value for name, value in case.items())
    ]
    return max(rows, key=lambda row: row.rate, default=None)


def _times(stage: str, ours: str, other: str, **case: int) -> Callable[..., str | None]:
    """Our tokens/s over those of the other, and the memory of either."""

    def measured(results: dict[str, Result]) -> str | None:
        first, second = (_row(results, stage, name, **case) for name in (ours, other))
        if first is None or second is None:
            return None
        memory = f"{size(first.added_bytes)} against {size(second.added_bytes)}"
        return f"{first.rate / second.rate:.2f}x; memory {memory}"

    return measured


def _of_roofline(results: dict[str, Result]) -> str | None:
    row = _row(results, "op", "retnet-triton", key_dim=256, tokens=8192)
    if row is None or row.roofline is None:
        return None
    design, floor = (row.roofline[name] / row.seconds for name in ("design", "floor"))
    return f"{design:.0%} of the design's roofline, {floor:.0%} of the floor"


def _of_bandwidth(stage: str) -> Callable[..., str | None]:
    def measured(results: dict[str, Result]) -> str | None:
        rows = [
            row
            for row in (results[stage].rows if stage in results else [])
            if row.contender == "retnet" and row.error is None and row.samples
        ]
        return ", ".join(f"{row.fraction:.0%} at batch {row.case['batch']}" for row in rows) or None

    return measured


_FLA = "flash-linear-attention"
TARGETS = (
    Target(
        "op, forward + backward, K 256, V 512, T 8192, over flash-linear-attention",
        "1.8x",
        _times("op", "retnet-triton", _FLA, key_dim=256, tokens=8192),
    ),
    Target("the same against the roofline of this run", "45 %", _of_roofline),
    Target(
        "training 1.3B at 8192 over an equal Transformer with SDPA",
        "more than 1.15x, 1.25x aimed at",
        _times("train", "retnet", "transformer"),
    ),
    Target(
        "training 1.3B at 8192 over flash-linear-attention's RetNet",
        "1.2x at no more memory",
        _times("train", "retnet", _FLA),
    ),
    Target("decoding with 1.3B, of the memory read", "80 %", _of_bandwidth("decode")),
    Target("decoding with 6.7B, of the memory read", "80 %", _of_bandwidth("decode-6.7b")),
    *(
        Target(
            f"decoding with {model}, tokens/s at {where} over {name}",
            "as it is",
            _times(stage, "retnet", contender, **case),
        )
        for model, stage in (("1.3B", "decode"), ("6.7B", "decode-6.7b"))
        for name, contender in (("MHA", "transformer"), ("8-fold GQA", "transformer-gqa8"))
        for where, case in (("batch 1", {"batch": 1}), ("the best batch of each", {}))
    ),
)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
