"""`retentive bench prefill`: reading a prompt, up to the logits that follow it.

Ours read it as `retentive generate` does. FLOPs are those that it takes, without the vocabulary's
head, whose result is wanted of the last token only.
"""

from dataclasses import dataclass

from retentive.bench import figures, tables
from retentive.bench.contenders import Entry
from retentive.bench.measure import measure_case
from retentive.bench.models import subject
from retentive.bench.options import Common, check_positive
from retentive.bench.results import Result
from retentive.models.counts import flops_per_token


@dataclass(frozen=True)
class PrefillBenchmark(Common):
    model: str = "38m"
    """A size by name, or the folder of a RetNet."""
    lengths: tuple[int, ...] = (2048, 8192)
    """Tokens of the prompt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("lengths", *self.lengths, least=2)


def run(options: PrefillBenchmark) -> None:
    limits, model = options.limits(), subject(options.model)
    entries = [Entry(contender, model) for contender in options.taking_part("prefill")]
    old = options.old("prefill")
    options.check_writable()
    result = Result.begun("prefill", options, limits)
    for tokens in options.lengths:
        case = {**options.case("prefill", limits), "tokens": tokens}
        asked = bool(options.contenders)
        rows = measure_case(case, entries, options.rounds, limits, sizes=["tokens"], asked=asked)
        for entry, row in zip(entries, rows, strict=True):
            row.tokens, row.limit = tokens, limits.gemm
            row.work = tokens * flops_per_token(entry.config(), (tokens + 1) / 2, head=False)
        result.rows += rows
        result.save(options.out)
    tables.show(result, f"reading a prompt, {options.model}", of="GEMM rate")
    figures.by_length(result, options.figure_stem, "Reading a prompt")
    tables.finish(result, options, old)
