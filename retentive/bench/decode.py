"""`retentive bench decode`: the cost of a token over contexts and batches, and along one sequence.

Every contender decodes greedily behind a context: a RetNet from the state of a prompt, a
Transformer from caches of random keys and values, which cost the same time as real ones. On a GPU
the steps are CUDA graphs, the Transformers' as well as ours. Then the model decodes one sequence
for `--tokens` tokens; the states on the way are kept, and blocks of tokens from each of them are
timed in turn, so that a noisy machine is as noisy to all of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from retentive.bench import figures, tables
from retentive.bench.along import cost_along
from retentive.bench.contenders import Entry, entries_of_itself
from retentive.bench.estimates import needed_bytes
from retentive.bench.limits import Limits, available_bytes
from retentive.bench.measure import measure_case
from retentive.bench.models import reference_model
from retentive.bench.options import Common, check_positive
from retentive.bench.processes import ProcessPool
from retentive.bench.results import Result, Row
from retentive.devices import resolve_dtype
from retentive.errors import InputError
from retentive.models.counts import decode_bytes, state_bytes

MOST_STEPS = 32  # in a round
LARGEST = 0  # stands for the largest batch that fits
MOST_ROWS = 1024
SPARE = 0.9  # of the free memory; the rest is for all that the estimate leaves out

Models = tuple[str, ...]
if not TYPE_CHECKING and find_spec("tyro"):  # without it there is no command line, and no need
    from tyro.conf import UseAppendAction

    Models = UseAppendAction[Models]


@dataclass(frozen=True)
class DecodeBenchmark(Common):
    model: Models = ()
    """A model folder, or a size by name, with random weights (they are as fast). Given several
    times, each model has rows of its own, and the other contenders are matched to the first. Unless
    given 38m, on a GPU 1.3b."""
    batches: tuple[int, ...] = ()
    """Sequences decoded at once; 0 is the largest power of two that fits into the memory, for each
    contender its own. 1 and 8, on a GPU 1 and 0, unless given."""
    contexts: tuple[int, ...] = ()
    """Tokens read before those that are timed; 128 2048 8192, on a GPU the last, unless given."""
    tokens: int | None = None
    """Decoded one by one, for the cost of a token along one sequence; 0 leaves this out. 16384, on
    a GPU 0, unless given."""

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


def run(options: DecodeBenchmark) -> None:
    old = options.old("decode")
    result = measure(options)
    tables.show(result, "decoding", of="memory read")
    if "along" in result.more:
        tables.show_along(result.more["along"])
    figures.decode(result, options.figure_stem)
    tables.finish(result, options, old)


def measure(options: DecodeBenchmark) -> Result:
    """All cases; `options.out` has those so far at any time."""
    entries, limits = all_entries(options), options.limits()
    options.check_writable()
    result = Result.new("decode", options, limits)
    with ExitStack() as stack:
        pool = options.pool(stack, entries)
        for batch in options.batches:
            for context in options.contexts:
                take = decode_rows if batch != LARGEST else largest_rows
                for row in take(entries, options, limits, batch, context, pool):
                    result.rows.append(row)
                    result.save(options.out)
    if options.tokens and (own := next((e for e in entries if e.is_reference), None)):
        result.more["along"] = cost_along(own, options.case("along", limits), options.tokens)
        result.save(options.out)
    return result


def all_entries(options: DecodeBenchmark) -> list[Entry]:
    """All contenders beside the first model, and those that are one of the other models."""
    first, *others = [reference_model(given) for given in options.model]
    entries = options.entries("decode", first)
    for model in others:
        entries += entries_of_itself(options.entries("decode", model), "decode")
    return entries


def largest_rows(
    entries: Sequence[Entry],
    options: Common,
    limits: Limits,
    batch: int,
    context: int,
    pool: ProcessPool | None,
) -> Iterator[Row]:
    """Each contender at the largest power of two of sequences that fits, or its failure at one."""
    for entry in entries:
        rows = _largest(entry, options.case("decode", limits), context, limits)
        while True:
            try:
                (row,) = decode_rows([entry], options, limits, rows, context, pool)
            except InputError as reason:  # not even one
                sizes: dict[str, int | str] = {"batch": rows, "context": context}
                row = Row(entry.contender.name, sizes, error=str(reason))
            if rows == 1 or not (row.error or "").startswith("out of memory"):
                break
            rows //= 2
        yield row


def _largest(entry: Entry, case: dict[str, Any], context: int, limits: Limits) -> int:
    """By the estimate, where the system says how much is free."""
    free = available_bytes(limits.device)
    rows = MOST_ROWS if free is not None else 1
    while rows > 1:
        needed = needed_bytes(entry, {**case, "batch": rows, "context": context}, {})
        if needed <= SPARE * (free or 0):
            break
        rows //= 2
    return rows


def decode_rows(
    entries: Sequence[Entry],
    options: Common,
    limits: Limits,
    batch: int,
    context: int,
    pool: ProcessPool | None = None,
) -> list[Row]:
    """One case. Where there are several models, the rows that run them have their names, too."""
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
        pool=pool,
        apart=options.on_gpu,
    )
    dtype = resolve_dtype(options.dtype)
    for entry, row in zip(entries, rows, strict=True):
        config = entry.config()
        row.tokens, row.limit = batch, limits.stream
        row.work = decode_bytes(config, batch, context, dtype=dtype, weights=row.weight_bytes)
        if row.memory is not None:
            row.memory["state"] = batch * state_bytes(config, context, dtype=dtype)
        if several and entry.is_reference:
            assert entry.model is not None
            row.contender = f"{row.contender} {entry.model.name}"
    return rows
