"""The cost of a token along one long sequence; the contender's side is `workers.along`.

A model with a state decodes every token; the cache of a Transformer is filled between the marks at
which it is measured.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from retentive.bench.contenders import Entry, chosen
from retentive.bench.models import reference_model
from retentive.bench.peers import Unavailable
from retentive.bench.processes import Process
from retentive.bench.workers.along import TIMED
from retentive.errors import InputError

__all__ = ["TIMED", "Mark", "cost_along", "measure_along"]

MARKS = 16  # states kept along the sequence
BLOCK = 16  # tokens timed from a state in its turn
BLOCK_ROUNDS = 24


@dataclass(frozen=True)
class Mark:
    """Behind `position` tokens: seconds a token, bytes of state in use, bytes of the process."""

    position: int
    seconds: float
    state: int
    resident: int


def measure_along(
    name: str,
    folder: Path,
    positions: Sequence[int],
    *,
    device: str,
    on_mark: Callable[[int], None],
) -> list[Mark]:
    """A contender beside the model of a folder, decoding one sequence past the rising `positions`.

    It runs in a process of its own; `on_mark` is called with each position. Raises InputError where
    it fails.
    """
    (contender,) = chosen("decode", name)
    threads = torch.get_num_threads()
    case = {"task": "along", "device": device, "dtype": "float32", "threads": threads}
    case |= {"batch": 1, "marks": list(positions), "keep_states": False}
    entry = Entry(contender, reference_model(str(folder)))
    process = Process(contender.worker, threads)
    try:
        return _decode(process, entry, case, on_mark)
    except Unavailable as reason:
        raise InputError(f"{name} could not be measured: {reason}") from None
    finally:
        process.close()


def cost_along(entry: Entry, case: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Time of a token and memory at marks along `tokens` tokens, and their drift.

    Times are of blocks from the states kept at the marks, in turn. "error" where it fails.
    """
    from rich.progress import Progress

    marks = marks_along(tokens)
    with Progress(transient=True) as progress, ExitStack() as stack:
        task = progress.add_task(f"decoding {tokens:,} tokens", total=tokens)
        process = Process(entry.contender.worker, case["threads"])
        stack.callback(process.close)
        case = {**case, "batch": 1, "marks": marks, "keep_states": True}
        try:
            measures = _decode(
                process, entry, case, lambda position: progress.update(task, completed=position)
            )
            samples = in_turn(len(marks), lambda at: process.run(at=at, times=BLOCK)["seconds"])
        except Unavailable as reason:
            return {"contender": entry.contender.name, "error": str(reason)}
    times = [median(map(median, blocks)) for blocks in samples]
    return {
        "contender": entry.contender.name,
        "measures": [asdict(mark) for mark in measures],
        "samples": samples,
        "seconds": times,
        "drift": {
            "seconds": drift(times),
            "resident": drift([mark.resident for mark in measures]),
        },
    }


def _decode(
    process: Process, entry: Entry, case: dict[str, Any], on_mark: Callable[[int], None]
) -> list[Mark]:
    """Decodes up to each of `case["marks"]`."""
    marks: list[Mark] = []

    def on_message(message: dict[str, Any]) -> None:
        marks.append(Mark(**message))
        on_mark(marks[-1].position)

    process.prepare(entry.case(case), on_message)
    return marks


def marks_along(tokens: int) -> list[int]:
    """Positions from 128 on in even ratios, the last at `tokens`."""
    ratio = (tokens / 128) ** (1 / (MARKS - 1))
    return sorted({round(128 * ratio**n) for n in range(MARKS)})


def in_turn(count: int, block: Callable[[int], list[float]]) -> list[list[list[float]]]:
    """Blocks of each in turn, every other round backwards: none always follows the same one."""
    samples: list[list[list[float]]] = [[] for _ in range(count)]
    for number in range(BLOCK_ROUNDS):
        order = range(count) if number % 2 == 0 else reversed(range(count))
        for at in order:
            samples[at].append(block(at))
    return samples


def drift(values: Sequence[float]) -> float:
    """The last quarter over the first, medians."""
    quarter = max(1, len(values) // 4)
    return median(values[-quarter:]) / median(values[:quarter])
