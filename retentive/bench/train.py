"""`retentive bench train`: steps of the whole model, forward, backward and AdamW's update.

FLOPs are those of the mathematics (retention at a chunk of 64, no recomputation), three times the
forward pass. Memory is the peak of a process that has done nothing else, above its start.

A model that is too large for one device is measured as some of its layers (`--layers`), without
the update (`--no-update`) where its moments are too large as well; tables and results say so.
"""

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass

from retentive.bench import figures, tables
from retentive.bench.contenders import Entry
from retentive.bench.limits import Limits
from retentive.bench.measure import measure_case
from retentive.bench.models import ReferenceModel, reference_model
from retentive.bench.options import Common, check_positive
from retentive.bench.processes import ProcessPool
from retentive.bench.results import Result, Row
from retentive.errors import InputError
from retentive.models.counts import flops_per_token


@dataclass(frozen=True)
class TrainBenchmark(Common):
    model: str = ""
    """A size by name, or a model folder; 38m, on a GPU 1.3b, unless given."""
    steps: tuple[str, ...] = ()
    """The batches, as sequences x tokens of each; 4x512 1x2048 1x8192, on a GPU the last."""
    layers: int | None = None
    """Only so many of the model's layers."""
    update: bool = True
    """AdamW's update is part of the step."""
    checkpoint_layers: bool = False
    """Recompute activations in the backward pass, layer by layer, to save memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._default(
            model="1.3b" if self.on_gpu else "38m",
            steps=("1x8192",) if self.on_gpu else ("4x512", "1x2048", "1x8192"),
        )
        for step in self.steps:
            batch_and_tokens(step)
        if self.layers is not None:
            check_positive("layers", self.layers)

    def reference(self) -> ReferenceModel:
        model = reference_model(self.model)
        if self.layers is None:
            return model
        if model.folder is not None or self.layers > model.config.num_hidden_layers:
            raise InputError(
                f"layers is {self.layers} of {self.model}; give a size by name, and at most the"
                f" {model.config.num_hidden_layers} that it has"
            )
        config = dataclasses.replace(model.config, num_hidden_layers=self.layers)
        return ReferenceModel(model.name, config)

    @property
    def title(self) -> str:
        title = f"training steps, {self.model}"
        if self.layers is not None:
            title += f", {self.layers} layers of it"
        if not self.update:
            title += ", forward and backward only"
        return title + (", layers checkpointed" if self.checkpoint_layers else "")


def batch_and_tokens(step: str) -> tuple[int, int]:
    """`4x512` as two numbers."""
    batch, times, tokens = step.partition("x")
    if not (times and batch.isdigit() and tokens.isdigit() and int(batch) and int(tokens)):
        raise InputError(f"a step is {step!r}; give sequences x tokens, such as 4x512")
    return int(batch), int(tokens)


def run(options: TrainBenchmark) -> None:
    old = options.old("train")
    result = measure(options)
    tables.show(result, options.title, of="GEMM rate")
    figures.by_length(result, options.figure_stem, "Training")
    tables.finish(result, options, old)


def measure(options: TrainBenchmark) -> Result:
    """All cases; `options.out` has those so far at any time."""
    limits, entries = options.limits(), options.entries("train", options.reference())
    options.check_writable()
    result = Result.new("train", options, limits)
    how = {"update": options.update, "checkpoint": options.checkpoint_layers}
    with ExitStack() as stack:
        pool = options.pool(stack, entries)
        for step in options.steps:
            sizes = batch_and_tokens(step)
            result.rows += train_rows(entries, options, limits, *sizes, pool=pool, **how)
            result.save(options.out)
    return result


def train_rows(
    entries: list[Entry],
    options: Common,
    limits: Limits,
    batch: int,
    tokens: int,
    *,
    pool: ProcessPool | None = None,
    **how: bool,
) -> list[Row]:
    """One case. `how`: whether there is an "update", and a "checkpoint" in each layer."""
    case = {**options.case("train", limits), "batch": batch, "tokens": tokens, **how}
    rows = measure_case(
        case,
        entries,
        options.rounds,
        limits,
        sizes=["batch", "tokens"],
        named=bool(options.contenders),
        pool=pool,
        apart=options.on_gpu,
    )
    for entry, row in zip(entries, rows, strict=True):
        row.tokens, row.limit = batch * tokens, limits.gemm
        row.work = 3 * row.tokens * flops_per_token(entry.config(), (tokens + 1) / 2)
    return rows
