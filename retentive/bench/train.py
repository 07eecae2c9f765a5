"""`retentive bench train`: steps of the whole model, forward, backward and AdamW's update.

FLOPs are those of the mathematics (retention at a chunk of 64, no recomputation), three times the
forward pass. Memory is the peak of a process that has done nothing else, above its start.
"""

from dataclasses import dataclass

from retentive.bench import figures, tables
from retentive.bench.contenders import Entry
from retentive.bench.limits import Limits
from retentive.bench.measure import measure_case
from retentive.bench.models import subject
from retentive.bench.options import Common
from retentive.bench.results import Result, Row
from retentive.errors import InputError
from retentive.models.counts import flops_per_token


@dataclass(frozen=True)
class TrainBenchmark(Common):
    model: str = "38m"
    """A size by name, or the folder of a RetNet."""
    steps: tuple[str, ...] = ("4x512", "1x2048", "1x8192")
    """The batches of a step: rows x tokens of each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for step in self.steps:
            batch_and_tokens(step)


def batch_and_tokens(step: str) -> tuple[int, int]:
    """`4x512` as two numbers."""
    batch, times, tokens = step.partition("x")
    if not (times and batch.isdigit() and tokens.isdigit() and int(batch) and int(tokens)):
        raise InputError(f"a step is {step!r}; give rows x tokens, such as 4x512")
    return int(batch), int(tokens)


def run(options: TrainBenchmark) -> None:
    limits, model = options.limits(), subject(options.model)
    entries = [Entry(contender, model) for contender in options.taking_part("train")]
    old = options.old("train")
    options.check_writable()
    result = Result.begun("train", options, limits)
    for step in options.steps:
        result.rows += train_rows(entries, options, limits, *batch_and_tokens(step))
        result.save(options.out)
    tables.show(result, f"training steps, {options.model}", of="GEMM rate")
    figures.by_length(result, options.figure_stem, "Training")
    tables.finish(result, options, old)


def train_rows(
    entries: list[Entry], options: Common, limits: Limits, batch: int, tokens: int
) -> list[Row]:
    """One case."""
    case = {**options.case("train", limits), "batch": batch, "tokens": tokens}
    rows = measure_case(
        case,
        entries,
        options.rounds,
        limits,
        sizes=["batch", "tokens"],
        asked=bool(options.contenders),
    )
    for entry, row in zip(entries, rows, strict=True):
        row.tokens, row.limit = batch * tokens, limits.gemm
        row.work = 3 * row.tokens * flops_per_token(entry.config(), (tokens + 1) / 2)
    return rows
