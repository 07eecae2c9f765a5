"""`retentive bench op`: the retention op alone, forward and backward, beside other implementations.

Each contender is first tried at several chunk sizes and keeps its best. FLOPs of retention are
counted at one chunk size whatever ran.
"""

from dataclasses import dataclass

from retentive.bench import figures, tables
from retentive.bench.contenders import Entry
from retentive.bench.measure import measure_case
from retentive.bench.options import Common, check_positive
from retentive.bench.results import Result
from retentive.errors import InputError
from retentive.models.counts import attention_flops, retention_flops


@dataclass(frozen=True)
class OpBenchmark(Common):
    lengths: tuple[int, ...] = (2048, 8192, 32768, 131072)
    """Tokens of the sequence, one case each."""
    heads: int = 8
    key_dim: int = 64
    value_dim: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("heads", "key_dim", "value_dim"):
            check_positive(name, getattr(self, name))
        check_positive("lengths", *self.lengths, least=64)
        if not self.lengths:
            raise InputError("there are no lengths; give at least one")


def run(options: OpBenchmark) -> None:
    entries, limits = [Entry(c) for c in options.taking_part("op")], options.limits()
    old = options.old("op")
    options.check_writable()
    result = Result.begun("op", options, limits)
    shape = {name: getattr(options, name) for name in ("heads", "key_dim", "value_dim")}
    for tokens in options.lengths:
        case = {**options.case("op", limits), **shape, "tokens": tokens}
        rows = measure_case(
            case,
            entries,
            options.rounds,
            limits,
            sizes=["tokens"],
            asked=bool(options.contenders),
        )
        for row in rows:
            row.tokens, row.limit = tokens, limits.gemm
            row.work = tokens * flops_per_token(row.contender, options, tokens)
        result.rows += rows
        result.save(options.out)
    shown = f"H {options.heads}, K {options.key_dim}, V {options.value_dim}"
    tables.show(result, f"the op, forward + backward; B 1, {shown}", of="GEMM rate")
    figures.by_length(result, options.figure_stem, "The op")
    tables.finish(result, options, old)


def flops_per_token(contender: str, options: OpBenchmark, tokens: int) -> float:
    """Forward and backward."""
    if contender == "attention":
        return 3 * attention_flops(options.heads, options.key_dim, (tokens + 1) / 2)
    return 3 * retention_flops(options.heads, options.key_dim, options.value_dim)
