"""`retentive bench paper`: the paper's Table 4 and Figure 6, at a size that fits.

Table 4 is training: tokens/s and memory at growing lengths, beside a Transformer with fused
attention (as FlashAttention is) and one that holds all its scores. Figure 6 is decoding: memory,
throughput and latency over the context, and over the batch.

With `--budget` it ends within so many seconds: the cells that show the most come first, each is
estimated from those of its kind that were measured, and those that do not fit are named.
"""

from dataclasses import dataclass

from retentive.bench import figures, tables
from retentive.bench.contenders import Entry, chosen, entries
from retentive.bench.decode import decode_rows
from retentive.bench.limits import Limits
from retentive.bench.models import ReferenceModel, grows, reference_model
from retentive.bench.options import Common, check_positive
from retentive.bench.planning import Budget, Cell, extremes_first, in_turn
from retentive.bench.results import Result, Row
from retentive.bench.train import train_rows
from retentive.devices import resolve_dtype
from retentive.errors import InputError
from retentive.models.counts import decode_bytes, flops_per_token

USUAL = {  # the contenders unless others are named
    "train": ("model", "retnet", "transformer", "transformer-math"),
    "decode": ("model", "retnet", "transformer", "transformer-gqa"),
}
STARTING = 7.0  # seconds, about, until a contender's process answers
ASSUMED = 0.3  # of a limit, assumed before anything is measured


@dataclass(frozen=True)
class PaperBenchmark(Common):
    size: str = "38m"
    """A size by name, or a model folder."""
    lengths: tuple[int, ...] = (512, 2048, 8192)
    """Tokens of a training step, one sequence."""
    contexts: tuple[int, ...] = (128, 512, 2048, 8192)
    """Tokens read before those that are decoded, at the smallest batch."""
    batches: tuple[int, ...] = (1, 2, 4, 8)
    """Sequences decoded at once, at the second longest context."""
    rounds: int = 3
    budget: int | None = None
    """End within so many seconds; the least important cells are left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lengths", "contexts", "batches"):
            check_positive(name, *getattr(self, name))
            if not getattr(self, name):
                raise InputError(f"--{name} is empty; give at least one")
        if self.budget is not None:
            check_positive("budget", self.budget, least=10)


def run(options: PaperBenchmark) -> None:
    budget = Budget(options.budget)
    limits = options.limits()
    by_task = entries_by_task(options, reference_model(options.size))
    old = options.old("paper")
    options.check_writable()
    result = Result.new("paper", options, limits)
    limits.sample()
    left_out: list[tuple[Cell, float]] = []
    refused: list[str] = []
    for cell in budget.taken(planned(options, by_task, limits), left_out):
        try:
            result.rows += measure_cell(cell, by_task, options, limits)
        except InputError as reason:  # it fits into no contender's memory; others may
            refused.append(str(reason))
        result.save(options.out)
    result.more["left_out"] = [{"cell": str(cell), "seconds": about} for cell, about in left_out]
    result.more["refused"] = refused
    result.save(options.out)
    show(result, options)
    tables.finish(result, options, old)


def entries_by_task(options: PaperBenchmark, model: ReferenceModel) -> dict[str, list[Entry]]:
    """The contenders of each task; those that are named take part where they can."""
    if not options.contenders:
        return {task: entries(task, model=model, usual=usual) for task, usual in USUAL.items()}
    wanted = [name.strip() for name in options.contenders.split(",")]
    known = {task: {contender.name: contender for contender in chosen(task)} for task in USUAL}
    for name in wanted:
        if not any(name in names for names in known.values()):
            chosen("decode", name)  # raises the InputError that lists them
    return {
        task: [Entry(names[name], model) for name in names if name in wanted]
        for task, names in known.items()
    }


def planned(options: PaperBenchmark, by_task: dict[str, list[Entry]], limits: Limits) -> list[Cell]:
    """All cells, the most important first: the ends of each line, the three figures in turn."""
    contexts, batches = sorted(options.contexts), sorted(options.batches)
    middle = contexts[max(0, len(contexts) - 2)]
    train = [{"batch": 1, "tokens": tokens} for tokens in sorted(options.lengths)]
    over_context = [{"batch": batches[0], "context": context} for context in contexts]
    over_batch = [{"batch": batch, "context": middle} for batch in batches]
    sizes = in_turn(*map(extremes_first, (over_context, train, over_batch)))
    return [
        Cell(kind, size, sum(seconds(e, kind, size, options, limits) for e in by_task[kind]))
        for size in sizes
        for kind in ["train" if "tokens" in size else "decode"]
        if by_task[kind]
    ]


def seconds(
    entry: Entry, kind: str, sizes: dict[str, int], options: Common, limits: Limits
) -> float:
    """A first guess at the time of a contender in a cell, warm-up included."""
    config, batch = entry.config(), sizes["batch"]
    if kind == "train":
        tokens = sizes["tokens"]
        step = 3 * batch * tokens * flops_per_token(config, tokens / 2) / limits.gemm / ASSUMED
        return STARTING + (options.rounds + 1) * step
    context, dtype = sizes["context"], resolve_dtype(options.dtype)
    step = decode_bytes(config, batch, context, dtype=dtype) / limits.stream / ASSUMED
    reading = context * flops_per_token(config, head=False) / limits.gemm / ASSUMED
    reading = 0.0 if grows(config) else reading  # caches are filled instead
    return STARTING + reading + 3 * step + options.rounds * max(0.3, 3 * step)


def measure_cell(
    cell: Cell, by_task: dict[str, list[Entry]], options: Common, limits: Limits
) -> list[Row]:
    sizes = cell.sizes
    if cell.kind == "train":
        return train_rows(by_task["train"], options, limits, sizes["batch"], sizes["tokens"])
    return decode_rows(by_task["decode"], options, limits, sizes["batch"], sizes["context"])


def show(result: Result, options: PaperBenchmark) -> None:
    by_task = {
        "tokens": (f"training, {options.size} (the paper's Table 4)", "GEMM rate"),
        "context": (f"decoding, {options.size} (the paper's Figure 6)", "memory read"),
    }
    for over, (title, of) in by_task.items():
        rows = sorted((r for r in result.rows if over in r.case), key=lambda r: tuple(r.key[1:]))
        if rows:
            tables.show(result, title, of=of, rows=rows)
    out = tables.console()
    for left in result.more["left_out"]:
        out.print(f"left out for the budget: {left['cell']}, about {left['seconds']:.0f} s")
    for refused in result.more["refused"]:
        out.print(f"refused: {refused}")
    if (stem := options.figure_stem) is not None:
        figures.by_length(result, stem.with_name(f"{stem.name}-training"), "Training")
        figures.decode(result, stem)
