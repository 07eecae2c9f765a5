"""The report of `retentive eval tasks`: JSON and a table."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from retentive.io.atomic import write_text
from retentive.reports.tables import console, new_table

FORMAT = 1
NAME = "tasks.json"


class Metric(NamedTuple):
    name: str
    value: float
    error: float | None
    """Standard error; None where lm-eval has none."""

    def show(self) -> str:
        error = "" if self.error is None else f" ± {self.error:.4f}"
        return f"{self.value:.4f}{error}"


@dataclass(frozen=True)
class Outcome:
    """Of a task, or of a group: then of all its documents together."""

    task: str
    shots: int | None
    limit: int | None
    documents: int | None
    metrics: list[Metric]
    version: Any
    seconds: float

    @classmethod
    def of(
        cls,
        task: str,
        metrics: Mapping[str, Any],
        results: Mapping[str, Any],
        limit: int | None,
        seconds: float,
    ) -> Self:
        """Of lm-eval's "metric,filter" and "metric_stderr,filter"."""
        found = []
        for key, value in metrics.items():
            name, _, answers = key.partition(",")
            if not answers or name.endswith("_stderr"):
                continue
            error = metrics.get(f"{name}_stderr,{answers}")
            shown = name if answers == "none" else f"{name}, {answers}"
            found.append(Metric(shown, value, error if isinstance(error, float) else None))
        return cls(
            task,
            results["n-shot"].get(task),
            limit,
            metrics.get("sample_len"),
            found,
            results["versions"].get(task),
            seconds,
        )


@dataclass(frozen=True)
class NotRun:
    task: str
    reason: str


class Report:
    """What a folder holds of earlier runs stays, but for the same task, shots and limit."""

    def __init__(self, model: str, dtype: str, folder: Path):
        self.model, self.dtype, self.folder = model, dtype, folder
        self.outcomes: list[Outcome] = []
        self.not_run: list[NotRun] = []
        path = folder / NAME
        self.earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def add(self, found: list[Outcome] | NotRun) -> None:
        if isinstance(found, NotRun):
            self.not_run.append(found)
        else:
            self.outcomes += found

    def save(self) -> None:
        """As tasks.json."""
        import lm_eval

        report = {
            "evaluation": "tasks",
            "format": FORMAT,
            "model": self.model,
            "dtype": self.dtype,
            "lm_eval": lm_eval.__version__,
            "tasks": self._earlier_tasks() + [self._facts(outcome) for outcome in self.outcomes],
            "not_run": self._earlier_not_run() + [asdict(task) for task in self.not_run],
        }
        write_text(self.folder / NAME, json.dumps(report, indent=1) + "\n")

    @staticmethod
    def _facts(outcome: Outcome) -> dict[str, Any]:
        metrics = {m.name: {"value": m.value, "error": m.error} for m in outcome.metrics}
        return asdict(outcome) | {"metrics": metrics}

    def _earlier_tasks(self) -> list[dict[str, Any]]:
        now = {(o.task, o.shots, o.limit) for o in self.outcomes}
        rows = self.earlier.get("tasks", [])
        return [row for row in rows if (row["task"], row["shots"], row["limit"]) not in now]

    def _earlier_not_run(self) -> list[dict[str, Any]]:
        now = {task.task for task in (*self.outcomes, *self.not_run)}
        return [row for row in self.earlier.get("not_run", []) if row["task"] not in now]

    def show(self) -> None:
        columns = ["task", "shots", "documents", "metric", "value"]
        table = new_table(self.model, columns, words=["task", "metric"])
        for outcome in self.outcomes:
            numbers = ["" if n is None else f"{n:,}" for n in (outcome.shots, outcome.documents)]
            for row, metric in enumerate(outcome.metrics):
                first = [outcome.task, *numbers] if not row else ["", "", ""]
                table.add_row(*first, metric.name, metric.show())
        for task in self.not_run:
            table.add_row(task.task, "", "", "not run", "", style="dim")
        out = console()
        out.print(table)
        for task in self.not_run:
            out.print(f"{task.task} not run: {task.reason}", markup=False, soft_wrap=True)
        out.print(f"± standard errors. All of it in {self.folder}")
