"""Measuring a case: every contender ready in its own process, then taking turns round by round.

A machine that slows down slows all of them, and the limits that are measured between the rounds.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

from retentive.bench.contenders import Choice, Entry
from retentive.bench.estimates import needed_bytes
from retentive.bench.limits import Limits, available_bytes
from retentive.bench.peers import Unavailable
from retentive.bench.processes import Answer, Process, ProcessPool
from retentive.bench.results import Row
from retentive.errors import InputError

Case = dict[str, Any]
DOES_NOT_FIT = "does not fit"


def measure_case(
    case: Case,
    entries: Sequence[Entry],
    rounds: int,
    limits: Limits,
    *,
    sizes: Sequence[str],
    named: bool = False,
    run: Case | None = None,
    pool: ProcessPool | None = None,
    apart: bool = False,
) -> list[Row]:
    """A row for each entry, still without its work and the limit to compare it with.

    sizes   the keys of `case` that tell its rows from those of other cases
    named   the user named the contenders, so that slow ones run, too
    run     arguments of a run in the worker
    pool    their processes, instead of one for this case alone
    apart   all rounds of one contender before the next, where the memory does not hold two

    Raises InputError where the case fits into the memory for none of them.
    """
    shown = {name: case[name] for name in sizes}
    rows: list[Row] = []
    for group in [[entry] for entry in entries] if apart else [entries]:
        rows += _take_turns(case, group, rounds, limits, shown, named, run or {}, pool)
    unfit = [row.error for row in rows if row.error and row.error.startswith(DOES_NOT_FIT)]
    if unfit and not any(row.samples for row in rows):
        raise InputError(f"{_label(shown)}: {unfit[0]}; choose a smaller case")
    return rows


def _take_turns(
    case: Case,
    entries: Sequence[Entry],
    rounds: int,
    limits: Limits,
    shown: dict[str, Any],
    named: bool,
    run: Case,
    pool: ProcessPool | None,
) -> list[Row]:
    rows = [Row(e.contender.name, shown, form=e.contender.form) for e in entries]
    with ExitStack() as stack:
        ready: list[tuple[Row, Process]] = []
        for entry, row in zip(entries, rows, strict=True):
            try:
                refuse(entry, case, limits, named)
                process, facts = start(entry, case, limits, stack, pool)
                for name, value in facts.items():
                    setattr(row, name, value)
                ready.append((row, process))
            except Unavailable as reason:
                row.error = str(reason)
        for number in range(rounds if ready else 0):
            _log(f"{_label(shown)}: round {number + 1} of {rounds}")
            limits.sample()
            for row, process in list(ready):
                try:
                    answer = process.run(**run)
                    row.samples.append(answer["seconds"])
                    row.forward += answer.get("forward", [])
                    row.memory = process.memory()
                except Unavailable as reason:
                    row.error = str(reason)
                    ready.remove((row, process))
    return rows


def refuse(entry: Entry, case: Case, limits: Limits, named: bool) -> None:
    """Raises Unavailable for a contender that is known to fail before anything is started."""
    contender = entry.contender
    if reason := contender.missing(case["device"]):
        raise Unavailable(reason)
    if contender.most_tokens and case["tokens"] > contender.most_tokens and not named:
        raise Unavailable("takes minutes at this length; name it in --contenders to have it run")
    shortages = [shortage(entry, case, choice, limits) for choice in entry.choices(case["task"])]
    if all(shortages):
        raise Unavailable(str(shortages[-1]))


def shortage(entry: Entry, case: Case, choice: Choice, limits: Limits) -> str | None:
    """Why the case will not fit into the memory, with the estimate; None if it will."""
    needed, free = needed_bytes(entry, case, choice), available_bytes(limits.device)
    if free is None or needed <= free:
        return None
    return f"{DOES_NOT_FIT}: about {needed / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free"


def start(
    entry: Entry, case: Case, limits: Limits, stack: ExitStack, pool: ProcessPool | None
) -> tuple[Process, Answer]:
    """A process that is ready for the case at its best choice, and its facts.

    It has done nothing else, unless it is of the pool. `stack` ends it, or frees its memory.
    """
    name, worker = entry.contender.name, entry.contender.worker
    _log(f"{name}: preparing")
    choice = best_choice(entry, case, limits)
    if pool is None:
        process = Process(worker, case["threads"])
        end = process.close
    else:
        process = pool.get(name, worker, case["threads"])
        end = partial(pool.release, name)
    try:
        facts = process.prepare({**entry.case(case), **choice})
    except BaseException:
        end()
        raise
    stack.callback(end)
    return process, facts


def best_choice(entry: Entry, case: Case, limits: Limits) -> Choice:
    """The choice that runs fastest of those that fit into the memory."""
    choices = entry.choices(case["task"])
    choices = [choice for choice in choices if shortage(entry, case, choice, limits) is None]
    if not choices:  # others have taken memory since `refuse`
        raise Unavailable("it does not fit into the memory that is free now")
    if len(choices) == 1:
        return choices[0]
    worker = entry.contender.worker, case["threads"]
    process = Process(*worker)
    failed: Unavailable | None = None

    def seconds(choice: Choice) -> float:
        nonlocal process, failed
        try:
            process.prepare({**entry.case(case), **choice})
            return median(process.run()["seconds"])
        except Unavailable as reason:
            process.close()  # it may have died
            process, failed = Process(*worker), reason
            return float("inf")

    try:
        choice = fastest(choices, seconds)
    finally:
        process.close()
    if choice is None:
        assert failed is not None
        raise failed
    return choice


def fastest(choices: Sequence[Choice], seconds: Callable[[Choice], float]) -> Choice | None:
    """The fastest, tried in order until one is slower than the last: the rest may take minutes.

    The first two are always tried, since the first may be of another kind than the rest. None where
    all that were tried took infinitely long.
    """
    times = []
    for number, choice in enumerate(choices):
        times.append(seconds(choice))
        if number > 1 and times[-1] > times[-2]:
            break
    best = min(times)
    return None if best == float("inf") else choices[times.index(best)]


def _label(sizes: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in sizes.items())


def _log(line: str) -> None:
    print(line, file=sys.stderr)
