"""`retentive bench WHAT`: one benchmark each, its options its own."""

import importlib

from retentive.arguments import parse
from retentive.errors import InputError, nearest

BENCHMARKS = {  # name: (module with run(options), its options, help)
    "op": ("op", "OpBenchmark", "the retention op alone, forward and backward"),
    "train": ("train", "TrainBenchmark", "training steps of the whole model"),
    "prefill": ("prefill", "PrefillBenchmark", "reading a prompt"),
    "decode": ("decode", "DecodeBenchmark", "time and memory of a token, over context and batch"),
    "quality": ("quality", "QualityBenchmark", "what each part of a RetNet is worth in loss"),
    "paper": ("paper", "PaperBenchmark", "the paper's Table 4 and Figure 6, within a budget"),
}


def main(argv: list[str]) -> int:
    what, *rest = argv or ["--help"]
    if what in ("-h", "--help"):
        lines = [f"  {name:8}  {text}" for name, (_, _, text) in BENCHMARKS.items()]
        print("\n".join(["usage: retentive bench WHAT [OPTIONS]", "", *lines]))
        return 0
    if what not in BENCHMARKS:
        near = nearest(what, BENCHMARKS)
        raise InputError(f"unknown benchmark {what!r}{near}; choose {', '.join(BENCHMARKS)}")
    name, options, description = BENCHMARKS[what]
    module = importlib.import_module(f"retentive.bench.{name}")
    module.run(parse(getattr(module, options), rest, f"retentive bench {what}", description))
    return 0
