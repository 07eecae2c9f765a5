"""`retentive bench prefill`: reading a prompt, up to the logits of the next token.

Ours read it as `retentive generate` does. FLOPs are counted without the vocabulary's head, whose
result is wanted of the last token only.
"""

from dataclasses import dataclass

from retentive.bench import figures, tables
from retentive.bench.measure import measure_case
from retentive.bench.models import reference_model
from retentive.bench.options import Common, check_positive
from retentive.bench.results import Result
from retentive.models.counts import flops_per_token


@dataclass(frozen=True)
class PrefillBenchmark(Common):
    model: str = "38m"
    """A size by name, or a model folder."""
    lengths: tuple[int, ...] = (2048, 8192)
    """Tokens of the prompt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("lengths", *self.lengths, least=2)


def run(options: PrefillBenchmark) -> None:
    limits, entries = options.limits(), options.entries("prefill", reference_model(options.model))
    old = options.old("prefill")
    options.check_writable()
    result = Result.new("prefill", options, limits)
    for tokens in options.lengths:
        case = {**options.case("prefill", limits), "tokens": tokens}
        named = bool(options.contenders)
        rows = measure_case(case, entries, options.rounds, limits, sizes=["tokens"], named=named)
        for entry, row in zip(entries, rows, strict=True):
            row.tokens, row.limit = tokens, limits.gemm
            row.work = tokens * flops_per_token(entry.config(), (tokens + 1) / 2, head=False)
        result.rows += rows
        result.save(options.out)
    tables.show(result, f"reading a prompt, {options.model}", of="GEMM rate")
    figures.by_length(result, options.figure_stem, "Reading a prompt")
    tables.finish(result, options, old)
