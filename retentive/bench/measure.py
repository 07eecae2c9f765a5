"""Measuring a case: every contender ready in its own process, then taking turns round by round.

A machine that slows down slows all of them and the limits that are measured between the rounds.
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
from retentive.bench.processes import Answer, Kept, Process
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
    asked: bool = False,
    run: Case | None = None,
    kept: Kept | None = None,
    apart: bool = False,
) -> list[Row]:
    """A row for each entry, without the work it did and the limit to hold that against.

    sizes: the keys of `case` that tell its rows from those of other cases. asked: whether the
    contenders were named, so that slow ones run, too. run: arguments of a run in the worker.
    kept: where their processes come from, instead of one for this case alone. apart: all rounds of
    one contender before the next, where the memory does not hold two of them.

    Raises InputError where the case fits into the memory for none of them.
    """
    shown = {name: case[name] for name in sizes}
    rows: list[Row] = []
    for group in [[entry] for entry in entries] if apart else [entries]:
        rows += _in_turn(case, group, rounds, limits, shown, asked, run or {}, kept)
    unfit = [row.error for row in rows if row.error and row.error.startswith(DOES_NOT_FIT)]
    if unfit and not any(row.samples for row in rows):
        raise InputError(f"{_told(shown)}: {unfit[0]}; choose a smaller case")
    return rows


def _in_turn(
    case: Case,
    entries: Sequence[Entry],
    rounds: int,
    limits: Limits,
    shown: dict[str, Any],
    asked: bool,
    run: Case,
    kept: Kept | None,
) -> list[Row]:
    rows = [Row(e.contender.name, shown, form=e.contender.form) for e in entries]
    with ExitStack() as stack:
        ready: list[tuple[Row, Process]] = []
        for entry, row in zip(entries, rows, strict=True):
            try:
                refuse(entry, case, limits, asked)
                process, facts = started(entry, case, limits, stack, kept)
                describe(row, facts)
                ready.append((row, process))
            except Unavailable as reason:
                row.error = str(reason)
        for number in range(rounds if ready else 0):
            _note(f"{_told(shown)}: round {number + 1} of {rounds}")
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


def describe(row: Row, facts: Answer) -> None:
    for name, value in facts.items():
        setattr(row, name, value)


def refuse(entry: Entry, case: Case, limits: Limits, asked: bool) -> None:
    """Raises Unavailable for what is known before anything is started."""
    contender = entry.contender
    if reason := contender.missing(case["device"]):
        raise Unavailable(reason)
    if contender.most_tokens and case["tokens"] > contender.most_tokens and not asked:
        raise Unavailable("takes minutes at this length; name it in --contenders to have it run")
    doubts = [doubt(entry, case, choice, limits) for choice in entry.choices(case["task"])]
    if all(doubts):
        raise Unavailable(str(doubts[-1]))


def doubt(entry: Entry, case: Case, choice: Choice, limits: Limits) -> str | None:
    """Why it will not fit into the memory, with the estimate."""
    needed, there = needed_bytes(entry, case, choice), available_bytes(limits.device)
    if there is None or needed <= there:
        return None
    return f"{DOES_NOT_FIT}: about {needed / 2**30:.1f} GiB of {there / 2**30:.1f} GiB free"


def started(
    entry: Entry, case: Case, limits: Limits, stack: ExitStack, kept: Kept | None
) -> tuple[Process, Answer]:
    """Its process, ready for the case at its best choice, in which it has done nothing else.

    `stack` will end it, or have one that is kept free the case's memory.
    """
    name, worker = entry.contender.name, entry.contender.worker
    _note(f"{name}: preparing")
    choice = best_choice(entry, case, limits)
    if kept is None:
        process = Process(worker, case["threads"])
        end = process.close
    else:
        process = kept.started(name, worker, case["threads"])
        end = partial(kept.rest, name)
    try:
        facts = process.prepare({**entry.case(case), **choice})
    except BaseException:
        end()
        raise
    stack.callback(end)
    return process, facts


def best_choice(entry: Entry, case: Case, limits: Limits) -> Choice:
    choices = entry.choices(case["task"])
    choices = [choice for choice in choices if doubt(entry, case, choice, limits) is None]
    if not choices:  # since it was asked first, others have taken memory
        raise Unavailable("it does not fit the memory that is free now")
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
    """The fastest up to where they get slower: what follows may take minutes.

    The first is always held against the second, being perhaps of another kind than the rest. None
    where all of those tried took for ever.
    """
    times = []
    for number, choice in enumerate(choices):
        times.append(seconds(choice))
        if number > 1 and times[-1] > times[-2]:
            break
    best = min(times)
    return None if best == float("inf") else choices[times.index(best)]


def _told(sizes: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in sizes.items())


def _note(text: str) -> None:
    print(text, file=sys.stderr)
