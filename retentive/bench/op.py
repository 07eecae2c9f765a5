"""`retentive bench op`: the retention op alone, forward and backward, beside other implementations.

All contenders take turns in one run, so that a machine that slows down slows all of them; each is
first tried at several chunk sizes and keeps its best. Rates are compared with the machine's matrix
product rate, measured between the rounds.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from retentive.bench.output import check_writable
from retentive.bench.peers import PeerOp, PeerUnavailable
from retentive.errors import InputError
from retentive.models.counts import COUNTED_CHUNK
from retentive.models.files import write_text
from retentive.ops import retention
from retentive.ops.chunkwise import default_chunk_size
from retentive.ops.decay import log_decay
from retentive.train.metrics import measure_gemm_rate


@dataclass(frozen=True)
class OpBenchmark:
    lengths: tuple[int, ...] = (2048, 8192, 32768)
    """Tokens of the sequence, one case each."""
    ours_only: tuple[int, ...] = (131072,)
    """Longer cases without the peers, some of which take minutes there."""
    heads: int = 8
    key_dim: int = 64
    value_dim: int = 128
    threads: int = 2
    rounds: int = 5
    """Timed runs of each contender in a case; the median is reported."""
    out: Path | None = None
    """Write every number as JSON to this file."""

    def __post_init__(self) -> None:
        for name in ("heads", "key_dim", "value_dim", "threads", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if short := [t for t in (*self.lengths, *self.ours_only) if t < 1024]:
            raise InputError(f"lengths must be at least 1024 tokens, got {short[0]}")
        if odd := [t for t in self.lengths if t % 1024]:
            raise InputError(
                f"lengths must be multiples of 1024, got {odd[0]}: torchscale takes whole chunks "
                "only; put other lengths into --ours-only"
            )


class Contender(Protocol):
    name: str
    version: str
    form: str
    chunk_sizes: tuple[int | None, ...]
    """To choose the best from, None being its own choice."""

    def prepare(self, case: dict[str, Any]) -> None: ...
    def run(self) -> tuple[float, float]: ...
    def close(self) -> None: ...


class OurOp:
    """The production path, through the public function."""

    name, form = "retentive", "chunkwise"
    chunk_sizes: tuple[int | None, ...] = (None,)

    def __init__(self) -> None:
        from retentive import __version__

        self.version = __version__

    def prepare(self, case: dict[str, Any]) -> None:
        torch.set_num_threads(case["threads"])
        tokens = (1, case["tokens"], case["heads"])
        self._leaves = [
            torch.randn(*tokens, dim).requires_grad_()
            for dim in (case["key_dim"], case["key_dim"], case["value_dim"])
        ]
        self._log_decay = log_decay(case["heads"]).float()
        self._gradient = torch.randn_like(self._leaves[2])
        case["chunk_size"] = default_chunk_size(self._leaves[0], self._leaves[2])
        self.run()

    def run(self) -> tuple[float, float]:
        for x in self._leaves:
            x.grad = None
        q, k, v = self._leaves
        start = time.perf_counter()
        o, _ = retention(q, k, v, self._log_decay, form=self.form)
        middle = time.perf_counter()
        o.backward(self._gradient)
        return middle - start, time.perf_counter() - middle

    def close(self) -> None:
        self._leaves.clear()


def measure(options: OpBenchmark) -> Iterator[dict[str, Any]]:
    """The JSON-able result, after every case: each time with one case more."""
    contenders: list[Contender] = [
        OurOp(),
        PeerOp("yet-another-retnet", "its README's loop"),
        PeerOp("yet-another-retnet", "inputs split once"),
        PeerOp("torchscale"),
    ]
    cases: list[dict[str, Any]] = []
    result = {
        "benchmark": "op",
        "format": 1,
        "torch": torch.__version__,
        "options": {**asdict(options), "out": None},
        "flops_per_token": _flops_per_token(options),
        "cases": cases,
    }
    try:
        for tokens in (*options.lengths, *options.ours_only):
            here = contenders if tokens in options.lengths else contenders[:1]
            print(f"{tokens} tokens: {', '.join(c.name for c in here)} ...", file=sys.stderr)
            cases.append(_measure_case(options, tokens, here))
            yield result
    finally:
        for contender in contenders:
            contender.close()


def _flops_per_token(options: OpBenchmark) -> int:
    """Forward and backward, counted at one chunk size whatever ran."""
    K, V = options.key_dim, options.value_dim
    return 3 * options.heads * (2 * COUNTED_CHUNK * (K + V) + 4 * K * V)


def _measure_case(options: OpBenchmark, tokens: int, contenders: list[Contender]) -> dict[str, Any]:
    shape = {k: getattr(options, k) for k in ("heads", "key_dim", "value_dim", "threads")}
    rows = [_prepare_best(c, {"tokens": tokens, **shape}) for c in contenders]
    gemm_rates = []
    for _ in range(options.rounds):
        gemm_rates.append(measure_gemm_rate(torch.device("cpu"), torch.float32))
        for contender, row in zip(contenders, rows, strict=True):
            if "error" not in row:
                row["seconds"].append(contender.run())
    for contender in contenders:  # the next case starts with their memory free
        contender.close()
    return {"tokens": tokens, "gemm_flops": statistics.median(gemm_rates), "rows": rows}


def _prepare_best(contender: Contender, case: dict[str, Any]) -> dict[str, Any]:
    """The contender ready at its best chunk size, as an empty row; or a row with the reason."""
    row: dict[str, Any] = {k: getattr(contender, k) for k in ("name", "version", "form")}
    best, chosen = float("inf"), {**case, "chunk_size": contender.chunk_sizes[0]}
    try:
        for chunk_size in contender.chunk_sizes:  # until it gets slower: that may take minutes
            tried = {**case, "chunk_size": chunk_size}
            contender.prepare(tried)
            if len(contender.chunk_sizes) == 1:
                return {**row, "chunk_size": tried["chunk_size"], "seconds": []}
            if (seconds := sum(contender.run())) > best:
                break
            best, chosen = seconds, tried
        contender.prepare(chosen)
        return {**row, "chunk_size": chosen["chunk_size"], "seconds": []}
    except PeerUnavailable as reason:
        return {**row, "error": str(reason)}


def show(result: dict[str, Any]) -> None:
    """One table: a row for each case and contender, ratios within the run."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="retention, forward + backward, float32")
    for title in ("tokens", "contender", "C", "tokens/s", "spread", "of GEMM rate", "ours is"):
        table.add_column(title, justify="left" if title == "contender" else "right")
    for case in result["cases"]:
        ours = _median_seconds(case["rows"][0])
        for n, row in enumerate(case["rows"]):
            tokens = f"{case['tokens']}" if n == 0 else ""
            name = f"{row['name']} {row['version']}, {row['form']}"
            if "error" in row:
                table.add_row(tokens, f"{name}\n{row['error']}")
                continue
            seconds = _median_seconds(row)
            totals = [sum(s) for s in row["seconds"]]
            rate = case["tokens"] / seconds
            table.add_row(
                tokens,
                name,
                str(row["chunk_size"]),
                f"{rate:,.0f}",
                f"{min(totals) / seconds:.2f}-{max(totals) / seconds:.2f}",
                f"{rate * result['flops_per_token'] / case['gemm_flops']:.0%}",
                "" if n == 0 else f"{seconds / ours:.1f}x faster",
            )
        table.add_section()
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    rates = ", ".join(f"{case['gemm_flops'] / 1e9:.0f}" for case in result["cases"])
    options = result["options"]
    console.print(
        f"B 1, H {options['heads']}, K {options['key_dim']}, V {options['value_dim']}, "
        f"{options['threads']} threads, medians of {options['rounds']} interleaved runs; "
        f"GEMM rate of each case {rates} GFLOP/s",
        highlight=False,
    )


def _median_seconds(row: dict[str, Any]) -> float:
    return statistics.median(sum(s) for s in row["seconds"])


def run(options: OpBenchmark) -> None:
    check_writable(options.out)
    result: dict[str, Any] = {}
    for result in measure(options):
        if options.out is not None:
            write_text(options.out, json.dumps(result, indent=1, default=str) + "\n")
    show(result)
