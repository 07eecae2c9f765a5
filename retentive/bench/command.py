"""`retentive bench WHAT`: one benchmark each, its options its own."""

from retentive.arguments import parse
from retentive.errors import InputError, nearest

BENCHMARKS = {
    "op": "the retention op alone, forward and backward, beside other implementations",
    "decode": "time and memory of a token as a text grows",
}


def main(argv: list[str]) -> int:
    what, *rest = argv or ["--help"]
    if what in ("-h", "--help"):
        lines = [f"  {name:6}  {text}" for name, text in BENCHMARKS.items()]
        print("\n".join(["usage: retentive bench WHAT [OPTIONS]", "", *lines]))
        return 0
    if what not in BENCHMARKS:
        near = nearest(what, BENCHMARKS)
        raise InputError(f"unknown benchmark {what!r}{near}; choose {', '.join(BENCHMARKS)}")
    from retentive.bench import decode, op

    prog, description = f"retentive bench {what}", BENCHMARKS[what]
    if what == "op":
        op.run(parse(op.OpBenchmark, rest, prog, description))
    else:
        decode.run(parse(decode.DecodeBenchmark, rest, prog, description))
    return 0
