"""`retentive bench decode`: what a token costs, over contexts and batches, and along a long text.

Every contender decodes greedily behind a context: a RetNet from the state of a text it has read, a
Transformer from caches of random keys and values, which cost what those of a text cost. On a GPU
steps are CUDA graphs, of the Transformers as of ours. Then a
RetNet decodes one text for `--tokens` tokens; the states it had on the way are kept, and blocks of
tokens from each of them are timed in turn, so that a noisy machine is as noisy to all of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from statistics import median
from typing import TYPE_CHECKING, Any

from retentive.bench import figures, tables
from retentive.bench.contenders import Entry
from retentive.bench.estimates import needed_bytes
from retentive.bench.limits import Limits, available_bytes
from retentive.bench.measure import measure_case
from retentive.bench.models import subject
from retentive.bench.options import Common, check_positive
from retentive.bench.peers import Unavailable
from retentive.bench.processes import Kept, Process
from retentive.bench.results import Result, Row
from retentive.devices import resolve_dtype
from retentive.errors import InputError
from retentive.models.counts import decode_bytes, state_bytes

MARKS = 16  # states kept along the text
BLOCK = 16  # tokens timed from a state in its turn
BLOCK_ROUNDS = 24
MOST_STEPS = 32  # in a round
LARGEST = 0  # stands for the largest batch that fits
MOST_ROWS = 1024
SPARE = 0.9  # of the free memory; the rest is for what is not counted

Models = tuple[str, ...]
if not TYPE_CHECKING and find_spec("tyro"):  # without it there is no command line, and no need
    from tyro.conf import UseAppendAction

    Models = UseAppendAction[Models]


@dataclass(frozen=True)
class DecodeBenchmark(Common):
    model: Models = ()
    """A size by name, with random weights (they are as fast), or a RetNet's model folder; given
    several times, ours are measured of each, the others as equals of the first. Unless given 38m,
    on a GPU 1.3b."""
    batches: tuple[int, ...] = ()
    """Rows; 0 is the largest power of two that fits into the memory, for each contender its own.
    1 and 8, on a GPU 1 and 0, unless given."""
    contexts: tuple[int, ...] = ()
    """Tokens read before those that are timed; 128 2048 8192, on a GPU the last, unless given."""
    tokens: int | None = None
    """Decoded one by one, for what a token costs along a text; 0 leaves this out. 16384, on a GPU
    0, unless given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._default(
            model=("1.3b" if self.on_gpu else "38m",),
            batches=(1, LARGEST) if self.on_gpu else (1, 8),
            contexts=(8192,) if self.on_gpu else (128, 2048, 8192),
            tokens=0 if self.on_gpu else 16384,
        )
        check_positive("batches", *self.batches, least=0)
        check_positive("contexts", *self.contexts)
        if self.tokens and self.tokens < 1024:
            raise InputError(f"tokens must be at least 1024, or 0 for none, got {self.tokens}")


@dataclass(frozen=True)
class Measure:
    """At `position` tokens: seconds a token, bytes of state in use, bytes of the process in RAM."""

    position: int
    seconds: float
    state: int
    resident: int


def run(options: DecodeBenchmark) -> None:
    old = options.old("decode")
    result = measured(options)
    tables.show(result, "decoding", of="memory read")
    if "along" in result.more:
        tables.show_along(result.more["along"])
    figures.decode(result, options.figure_stem)
    tables.finish(result, options, old)


def measured(options: DecodeBenchmark) -> Result:
    """All cases; `options.out` has those so far at any time."""
    contenders, limits = options.taking_part("decode"), options.limits()
    models = [subject(given) for given in options.model]
    entries = [Entry(contender, models[0]) for contender in contenders]
    entries += [
        Entry(e.contender, model) for model in models[1:] for e in entries if e.opens_folder
    ]
    options.check_writable()
    result = Result.begun("decode", options, limits)
    with ExitStack() as stack:
        kept = options.kept(stack, entries)
        for batch in options.batches:
            for context in options.contexts:
                take = decode_rows if batch != LARGEST else largest_rows
                for row in take(entries, options, limits, batch, context, kept):
                    result.rows.append(row)
                    result.save(options.out)
    if options.tokens and (ours := next((e for e in entries if e.opens_folder), None)):
        result.more["along"] = flatness(ours, options, limits)
        result.save(options.out)
    return result


def largest_rows(
    entries: Sequence[Entry],
    options: Common,
    limits: Limits,
    batch: int,
    context: int,
    kept: Kept | None,
) -> Iterator[Row]:
    """For each contender the largest power of two of rows that fits, or its failure at one."""
    for entry in entries:
        rows = _largest(entry, options.case("decode", limits), context, limits)
        while True:
            try:
                (row,) = decode_rows([entry], options, limits, rows, context, kept)
            except InputError as reason:  # not even one row
                sizes: dict[str, int | str] = {"batch": rows, "context": context}
                row = Row(entry.contender.name, sizes, error=str(reason))
            if rows == 1 or not (row.error or "").startswith("out of memory"):
                break
            rows //= 2
        yield row


def _largest(entry: Entry, case: dict[str, Any], context: int, limits: Limits) -> int:
    """By the estimate, where the system says what is free."""
    there = available_bytes(limits.device)
    rows = MOST_ROWS if there is not None else 1
    while rows > 1:
        needed = needed_bytes(entry, {**case, "batch": rows, "context": context}, {})
        if needed <= SPARE * (there or 0):
            break
        rows //= 2
    return rows


def decode_rows(
    entries: Sequence[Entry],
    options: Common,
    limits: Limits,
    batch: int,
    context: int,
    kept: Kept | None = None,
) -> list[Row]:
    """One case. Ours are named by their models, too, where there are several."""
    case = {**options.case("decode", limits), "batch": batch, "context": context}
    case["room"] = MOST_STEPS * (options.rounds + 2)  # of a static cache: no more than is decoded
    several = len({entry.model for entry in entries}) > 1
    rows = measure_case(
        case,
        entries,
        options.rounds,
        limits,
        sizes=["batch", "context"],
        run={"seconds": 0.3, "most": MOST_STEPS},
        kept=kept,
        apart=options.on_gpu,
    )
    dtype = resolve_dtype(options.dtype)
    for entry, row in zip(entries, rows, strict=True):
        config = entry.config()
        row.tokens, row.limit = batch, limits.stream
        row.work = decode_bytes(config, batch, context, dtype=dtype, weights=row.weight_bytes)
        if row.memory is not None:
            row.memory["state"] = batch * state_bytes(config, context, dtype=dtype)
        if several and entry.opens_folder:
            assert entry.model is not None
            row.contender = f"{row.contender} {entry.model.name}"
    return rows


# Along a text


def flatness(entry: Entry, options: DecodeBenchmark, limits: Limits) -> dict[str, Any]:
    """Time of a token and memory at marks along a text of `options.tokens`, and their drift."""
    from rich.progress import Progress

    assert options.tokens is not None
    marks = marks_along(options.tokens)
    with Progress(transient=True) as progress, ExitStack() as stack:
        task = progress.add_task(f"decoding {options.tokens:,} tokens", total=options.tokens)
        process = Process(entry.contender.worker, options.threads)
        stack.callback(process.close)
        case = {**options.case("along", limits), "batch": 1, "marks": marks, "keep_states": True}
        try:
            measures = walk(
                process, entry, case, lambda position: progress.update(task, completed=position)
            )
            samples = in_turn(len(marks), lambda at: process.run(at=at, times=BLOCK)["seconds"])
        except Unavailable as reason:
            return {"contender": entry.contender.name, "error": str(reason)}
    times = [median(map(median, blocks)) for blocks in samples]
    return {
        "contender": entry.contender.name,
        "measures": [asdict(measure) for measure in measures],
        "samples": samples,
        "seconds": times,
        "drift": {
            "seconds": drift(times),
            "resident": drift([measure.resident for measure in measures]),
        },
    }


def walk(
    process: Process, entry: Entry, case: dict[str, Any], reached: Callable[[int], None]
) -> list[Measure]:
    """Decodes up to each of `case["marks"]`; `reached` hears of them."""
    measures: list[Measure] = []

    def heard(mark: dict[str, Any]) -> None:
        measures.append(Measure(**mark))
        reached(measures[-1].position)

    process.prepare(entry.case(case), heard)
    return measures


def marks_along(tokens: int) -> list[int]:
    """From 128 on, each as many times the one before, the last at `tokens`."""
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
