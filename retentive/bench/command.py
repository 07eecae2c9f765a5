"""`retentive bench WHAT`: the benchmarks, each with options of its own."""

import importlib

from retentive.arguments import parse
from retentive.errors import InputError, nearest

BENCHMARKS = {  # name: (module of the package with run(options), its options, help)
    "op": ("bench.op", "OpBenchmark", "the retention op alone, forward and backward"),
    "train": ("bench.train", "TrainBenchmark", "training steps of the whole model"),
    "prefill": ("bench.prefill", "PrefillBenchmark", "reading a prompt"),
    "decode": ("bench.decode", "DecodeBenchmark", "time and memory of a token"),
    "quality": (
        "arena.command",
        "QualityBenchmark",
        "the loss of a RetNet, its ablations and a Transformer, trained alike",
    ),
    "paper": ("bench.paper", "PaperBenchmark", "the paper's Table 4 and Figure 6"),
}


def main(argv: list[str]) -> int:
    what, *rest = argv or ["--help"]
    if what in ("-h", "--help"):
        lines = [f"  {name:8}  {text}" for name, (_, _, text) in BENCHMARKS.items()]
        print("\n".join(["usage: retentive bench WHAT [OPTIONS]", "", *lines]))
        return 0
    if what not in BENCHMARKS:
        near = nearest(what, BENCHMARKS)
        raise InputError(f"unknown benchmark {what!r}{near}; choose one of {', '.join(BENCHMARKS)}")
    name, options, description = BENCHMARKS[what]
    module = importlib.import_module(f"retentive.{name}")
    module.run(parse(getattr(module, options), rest, f"retentive bench {what}", description))
    return 0
