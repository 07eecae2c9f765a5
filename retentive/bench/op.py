"""`retentive bench op`: the retention op alone, forward and backward, beside other implementations.

Each contender is tried at several chunk sizes first and keeps its best. FLOPs of retention are
counted at one chunk size whatever ran. On a GPU the cases are the paper's head dims at equal width
and equally many tokens, each compared with its roofline, and the decoding step is measured, too.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from retentive.bench import figures, tables
from retentive.bench.contenders import Entry
from retentive.bench.limits import Limits
from retentive.bench.measure import measure_case
from retentive.bench.options import Common, check_positive
from retentive.bench.processes import ProcessPool
from retentive.bench.results import Result, Row
from retentive.bench.roofline import Op, roofline
from retentive.devices import resolve_dtype
from retentive.errors import InputError
from retentive.mixers.attention import attention_flops
from retentive.mixers.retention import retention_flops

WIDTH = {False: 512, True: 2048}  # H·K, on a GPU that of 1.3B
LENGTHS = {False: (2048, 8192, 32768, 131072), True: (8192, 2048, 32768)}
DIMS = {False: ((64, 128),), True: ((256, 512), (128, 256), (64, 128))}
GPU_TOKENS = 32768
GPU_TIMES = 10  # runs in a round,
GPU_SECONDS = 0.2  # or as many as fit into this


@dataclass(frozen=True)
class OpBenchmark(Common):
    lengths: tuple[int, ...] = ()
    """Tokens of a sequence, one case each; 2048 to 131072, on a GPU to 32768, unless given."""
    heads: int | None = None
    """Heads; unless given as many as make q 512 wide, on a GPU 2048."""
    key_dim: tuple[int, ...] = ()
    """Key dims of a head, one or several; 64, on a GPU also 128 and 256, unless given."""
    value_dim: tuple[int, ...] = ()
    """Value dims of a head; twice --key-dim unless given."""
    tokens: int | None = None
    """Tokens of all sequences of a case together; one sequence unless given, on a GPU 32768."""
    step: bool | None = None
    """Also measure a decoding step behind as many tokens; on a GPU unless refused."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._default(value_dim=tuple(2 * K for K in self.key_dim))
        if len(self.key_dim) != len(self.value_dim):
            raise InputError(
                f"got {len(self.key_dim)} --key-dim and {len(self.value_dim)} --value-dim;"
                " give as many of each"
            )
        K, V = zip(*DIMS[self.on_gpu], strict=True)
        self._default(key_dim=K, value_dim=V, lengths=LENGTHS[self.on_gpu], step=self.on_gpu)
        if self.on_gpu:
            self._default(tokens=max(GPU_TOKENS, *self.lengths))
        check_positive("key_dim", *self.key_dim)
        check_positive("value_dim", *self.value_dim)
        check_positive("lengths", *self.lengths, least=64)
        if self.heads is not None:
            check_positive("heads", self.heads)
        if self.tokens is not None:
            check_positive("tokens", self.tokens, least=max(self.lengths))

    def cases(self) -> list[dict[str, int]]:
        """Their sizes, on a GPU beginning with the one that the target of `docs/gpu.md` is for."""
        return [
            {
                "heads": self.heads or max(1, WIDTH[self.on_gpu] // K),
                "key_dim": K,
                "value_dim": V,
                "batch": (self.tokens or tokens) // tokens,
                "tokens": tokens,
            }
            for K, V in zip(self.key_dim, self.value_dim, strict=True)
            for tokens in self.lengths
        ]

    @property
    def key_sizes(self) -> list[str]:
        """The sizes that tell the rows of a case from those of others."""
        rows = ["batch"] if self.tokens else []
        return [*(["key_dim"] if len(self.key_dim) > 1 else []), *rows, "tokens"]


def run(options: OpBenchmark) -> None:
    old = options.old("op")
    result = measure(options)
    K, V = options.key_dim[0], options.value_dim[0]
    shown = f"H {options.cases()[0]['heads']}, K {K}, V {V}" if len(options.key_dim) == 1 else ""
    rows = [row for row in result.rows if "tokens" in row.case]
    tables.show(result, f"the op, forward + backward; {shown}", of="GEMM rate", rows=rows)
    if steps := [row for row in result.rows if "context" in row.case]:
        tables.show(result, "a step of the op", of="memory read", rows=steps)
    figures.by_length(result, options.figure_stem, "The op")
    tables.finish(result, options, old)


def measure(options: OpBenchmark) -> Result:
    """All cases; `options.out` has those so far at any time."""
    entries = options.entries("op")
    steps = options.entries("step") if options.step else []
    limits = options.limits()
    options.check_writable()
    result = Result.new("op", options, limits)
    with ExitStack() as stack:
        pool = options.pool(stack, entries)
        for sizes in options.cases():
            result.rows += op_rows(entries, options, limits, sizes, pool)
            result.save(options.out)
            if steps:
                result.rows += step_rows(steps, options, limits, sizes, pool)
                result.save(options.out)
    return result


def op_rows(
    entries: list[Entry],
    options: OpBenchmark,
    limits: Limits,
    sizes: dict[str, int],
    pool: ProcessPool | None,
) -> list[Row]:
    """Forward and backward, one case."""
    rows = measure_case(
        {**options.case("op", limits), **sizes},
        entries,
        options.rounds,
        limits,
        sizes=options.key_sizes,
        named=bool(options.contenders) or options.on_gpu,
        run={"times": GPU_TIMES, "seconds": GPU_SECONDS} if options.on_gpu else None,
        pool=pool,
    )
    heads, K, V = (sizes[name] for name in ("heads", "key_dim", "value_dim"))
    for row in rows:
        row.tokens, row.limit = sizes["batch"] * sizes["tokens"], limits.gemm
        row.work = row.tokens * flops_per_token(row.contender, sizes)
        if options.on_gpu and row.contender != "attention" and row.error is None:
            op = Op(row.tokens, heads, K, V, resolve_dtype(options.dtype).itemsize)
            row.roofline = roofline(op, limits.gemm, limits.stream)
    return rows


def step_rows(
    entries: list[Entry],
    options: OpBenchmark,
    limits: Limits,
    sizes: dict[str, int],
    pool: ProcessPool | None,
) -> list[Row]:
    """One more token in each sequence, behind `tokens` of it."""
    case: dict[str, Any] = {**options.case("step", limits), **sizes, "context": sizes["tokens"]}
    keys = ["context" if name == "tokens" else name for name in options.key_sizes]
    rows = measure_case(case, entries, options.rounds, limits, sizes=keys, named=True, pool=pool)
    size = resolve_dtype(options.dtype).itemsize
    for row in rows:
        row.tokens, row.limit = sizes["batch"], limits.stream
        row.work = sizes["batch"] * step_bytes(row.contender, sizes, size)
    return rows


def flops_per_token(contender: str, sizes: dict[str, int]) -> float:
    """Forward and backward."""
    heads, K, V = (sizes[name] for name in ("heads", "key_dim", "value_dim"))
    if contender == "attention":
        return 3 * attention_flops(heads, K, (sizes["tokens"] + 1) / 2)
    return 3 * retention_flops(heads, K, V)


def step_bytes(contender: str, sizes: dict[str, int], size: int) -> int:
    """Of a sequence: the state read and written in float32, or the keys and values read."""
    heads, K, V = (sizes[name] for name in ("heads", "key_dim", "value_dim"))
    if contender == "attention":
        return 2 * sizes["tokens"] * heads * K * size
    return 2 * heads * K * V * 4
