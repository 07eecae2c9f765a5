"""`retentive bench WHAT`: one benchmark each, its options its own."""

from retentive.arguments import parse
from retentive.errors import InputError, nearest

BENCHMARKS = {"op": "the retention op alone, forward and backward"}


def main(argv: list[str]) -> int:
    what, *rest = argv or ["--help"]
    if what in ("-h", "--help"):
        lines = [f"  {name}  {text}" for name, text in BENCHMARKS.items()]
        print("\n".join(["usage: retentive bench WHAT [OPTIONS]", "", *lines]))
        return 0
    if what not in BENCHMARKS:
        near = nearest(what, BENCHMARKS)
        raise InputError(f"unknown benchmark {what!r}{near}; choose {', '.join(BENCHMARKS)}")
    from retentive.bench import op

    op.run(parse(op.OpBenchmark, rest, "retentive bench op", BENCHMARKS["op"]))
    return 0
