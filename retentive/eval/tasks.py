"""`retentive eval tasks`: the paper's tasks and any other of lm-eval's, with our adaptor.

A task whose data is not here and cannot be fetched is one of the results, with the reason.
"""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from retentive.convert.loading import load_config
from retentive.errors import InputError, nearest
from retentive.eval.options import Options, check_least, open_model, open_results
from retentive.eval.tasks_report import NotRun, Outcome, Report

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

PAPER = (  # of its §3.2, by lm-eval's names, and LAMBADA
    "hellaswag",
    "boolq",
    "copa",
    "piqa",
    "wsc273",
    "winogrande",
    "storycloze_2016",
    "lambada_openai",
)
BOOTSTRAPS = 1000  # for the errors of what is no mean, as lambada's perplexity
FEWSHOT_SEED = 1234  # lm-eval's own


@dataclass(frozen=True)
class TasksOptions(Options):
    tasks: Annotated[
        tuple[str, ...] | None,
        tyro.conf.arg(help_behavior_hint="(default: the paper's, or all of --include)"),
    ] = None
    """Names of tasks, groups and tags; patterns as mmlu_* do."""
    include: tuple[Path, ...] = ()
    """Folders of tasks of your own: YAML files, the data they name beside them."""
    shots: int | None = None
    """Examples before each question; as the task says unless given, which mostly is none."""
    limit: int | None = None
    """Of each task only so many documents: to try things out."""

    def check(self) -> None:
        super().check()
        check_least("limit", self.limit)
        check_least("shots", self.shots, 0)
        for folder in self.include:
            if not folder.is_dir():
                raise InputError(f"--include {folder} is no folder; give one that holds YAML files")
        if self.tasks == ():
            raise InputError("--tasks is empty; give at least one, or leave it out")


def run(options: TasksOptions) -> int:
    """0 if any task was run. Raises InputError for what the options and the model refuse."""
    options.check()
    load_config(options.model)
    _quiet()
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise InputError(
            'the tasks need lm-eval, which is not installed: pip install "retentive[eval]"'
        ) from None
    from retentive.eval.harness import RetentiveLM

    manager, names = _find(options)
    model, tokenizer = open_model(options)
    with open_results(options, model, tokenizer) as results:
        lm = RetentiveLM(
            model,
            tokenizer=tokenizer,
            batch_size=options.batch_size,
            answers=results,
        )
        report = Report(str(options.model), options.dtype, results.folder)
        for name in names:
            report.add(evaluate(lm, manager, name, options))
            report.save()
    report.show()
    return 0 if report.outcomes else 1


def _quiet() -> None:
    """Of lm-eval no processes for a bootstrap, nor what it has to say about its own tasks' YAML."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    logging.getLogger("lm_eval.api.task").setLevel(logging.ERROR)


def _find(options: TasksOptions) -> tuple["TaskManager", list[str]]:
    """What knows the tasks, and the names of those to run. InputError for an unknown name."""
    from lm_eval.tasks import TaskManager

    include: list[str | Path] = [folder.absolute() for folder in options.include]
    manager = TaskManager(include_path=include, include_defaults=False)
    own = manager.all_subtasks
    if include and not own:
        raise InputError(
            f"--include {' '.join(map(str, options.include))} holds no task: a YAML file with task,"
            " dataset_path and doc_to_text"
        )
    wanted = options.tasks or own or PAPER
    if not all(manager.match_tasks([name]) for name in wanted):
        manager = TaskManager(include_path=include or None)  # lm-eval's own take seconds to read
    names: dict[str, None] = {}
    for name in wanted:
        found = manager.match_tasks([name])
        if not found:
            near = nearest(name, manager.all_tasks)
            raise InputError(
                f"unknown task {name!r}{near}; give a name of lm-eval's (lm_eval ls tasks lists"
                " them), or a folder of your own with --include"
            )
        names |= dict.fromkeys(found)
    return manager, list(names)


def evaluate(
    lm: Any, manager: "TaskManager", name: str, options: TasksOptions
) -> list[Outcome] | NotRun:
    """A task's metrics, or why it has none; a group's tasks each, and their aggregate."""
    from lm_eval.evaluator import evaluate as evaluate_tasks

    try:
        with _beside(manager, name, options.include), _to_stderr():
            loaded = manager.load([name])
            for task in loaded["tasks"].values():
                _prepare(task, options)
    except Exception as error:  # what datasets, the Hub and templates raise is of many kinds
        return NotRun(name, _reason(error))
    began = time.monotonic()
    try:
        with _to_stderr():
            results = evaluate_tasks(
                lm, loaded, limit=options.limit, bootstrap_iters=BOOTSTRAPS, log_samples=False
            )
    except (InputError, OSError):  # of the model and of our own folder, not of the task
        raise
    except Exception as error:  # of a document, its metric, or lm-eval's aggregate
        return NotRun(name, _reason(error))
    assert results is not None  # as in other processes than the first
    seconds = time.monotonic() - began
    return [
        Outcome.of(task, metrics, results, options.limit, seconds)
        for task, metrics in results.get("results", {}).items()
    ]


def _prepare(task: "Task", options: TasksOptions) -> None:
    """Its examples; and one document, in which mistakes show now that would stop a run later."""
    if getattr(task, "UNSAFE_CODE", False):
        raise ValueError("it runs code that the model writes; run it with lm-eval itself")
    fixed = task.get_config("num_fewshot")
    if fixed is None or (options.shots is not None and fixed != 0):  # 0: it takes none
        task.set_config("num_fewshot", options.shots or 0)
    task.set_fewshot_seed(FEWSHOT_SEED)
    task.build_all_requests(limit=1)
    task.set_fewshot_seed(FEWSHOT_SEED)


@contextlib.contextmanager
def _beside(manager: "TaskManager", name: str, include: Sequence[Path]) -> Iterator[None]:
    """In the folder of an own task's YAML, whose data files are named as seen from there."""
    path = manager.task_index[name].yaml_path
    own = path is not None and any(path.is_relative_to(folder.absolute()) for folder in include)
    with contextlib.chdir(path.parent) if own and path else contextlib.nullcontext():
        yield


def _to_stderr() -> contextlib.redirect_stdout[Any]:
    """What libraries print is no result."""
    return contextlib.redirect_stdout(sys.stderr)


def _reason(error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"
