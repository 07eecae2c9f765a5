"""A stage of `benchmarks/gpu.sh`: python benchmarks/gpu/stages.py STAGE FOLDER [--smoke]

A benchmark writes its result to FOLDER/STAGE.json as it goes; tests write logs, a line a test.
`--smoke` runs the same code at toy sizes on the CPU.
"""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
TEST_PROCESSES = 6  # each compiles and times tiles of its own
DTYPES = {"bfloat16": 8, "float16": 8, "float32": 2}
"""Of our kernels, with the largest number of their tile sizes (`kernels.triton.configs`)."""
TESTS = "tests/gpu"


def compile_kernels(folder: Path, smoke: bool) -> None:
    """Fills Triton's cache on disk for the stages after it, with many processes at once.

    One after the other the kernels would take minutes of every stage.
    """
    work = [] if smoke else compile_work()
    with ThreadPoolExecutor(max(2, (os.cpu_count() or 4) - 2)) as pool:
        list(pool.map(_compile, work))


def compile_work() -> list[list[str]]:
    """The arguments of `fill_cache.py`, the longest first."""
    ours = [["ours", dtype, str(n)] for dtype, count in DTYPES.items() for n in range(count)]
    peers = [["fla", K, V] for K, V in (("256", "512"), ("128", "256"), ("64", "128"))]
    peers.append(["fla-model", "2048", "256"])
    return [*(peers if _has_fla() else []), *ours]


def _has_fla() -> bool:
    try:
        return bool(importlib.metadata.version("flash-linear-attention"))
    except importlib.metadata.PackageNotFoundError:
        return False


def _compile(arguments: list[str]) -> None:
    command = [sys.executable, str(HERE / "fill_cache.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    last = (done.stderr.strip().splitlines() or ["without a message"])[-1]
    print(*arguments, "compiled" if done.returncode == 0 else f"failed: {last}", flush=True)


def run_tests(folder: Path, smoke: bool) -> None:
    """All tests marked gpu, split among processes; each logs to FOLDER/tests-N.log."""
    for needed in ("pytest", "hypothesis"):
        if find_spec(needed) is None:
            raise SystemExit(f"{needed} is not installed: the tests do not run")
    # Other plugins of the machine, and warnings of its versions, must not fail these tests
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    pytest = [sys.executable, str(HERE / "run_tests.py"), "-m", "gpu", "-W", "default"]
    listed = subprocess.run(
        [*pytest, "--collect-only", "-q", TESTS], capture_output=True, text=True
    )
    names = [line for line in listed.stdout.splitlines() if "::" in line]
    if not names:
        raise SystemExit(f"no tests found: {(listed.stdout + listed.stderr).strip()[-500:]}")
    (folder / "tests.txt").write_text("\n".join(names))
    count = 1 if smoke else TEST_PROCESSES
    running = []
    for number, part in enumerate(split(names, count)):
        log = (folder / f"tests-{number}.log").open("w")
        running.append(subprocess.Popen([*pytest, "-v", *part], stdout=log, stderr=log))
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit(f"pytest ended with {max(codes)}")


def split(names: Sequence[str], count: int) -> list[list[str]]:
    """At most `count` parts. Neighbours differ in length and dtype, so the parts take as long."""
    return [list(names[n::count]) for n in range(min(count, len(names)))]


def op(folder: Path, smoke: bool) -> None:
    from retentive.bench.op import OpBenchmark, measure

    out = folder / "op.json"
    if not smoke:
        measure(OpBenchmark(device="cuda", rounds=3, out=out))
        return
    names = "retnet,attention,retnet-triton"
    sizes = {"heads": 1, "key_dim": (16, 8), "lengths": (64,), "tokens": 128}
    toy = OpBenchmark(device="cpu", rounds=1, contenders=names, step=True, out=out, **sizes)
    measure(toy)


def train(folder: Path, smoke: bool) -> None:
    from retentive.bench.train import TrainBenchmark, measure

    out = folder / "train.json"
    if smoke:
        names = "retnet,transformer"
        measure(
            TrainBenchmark(
                device="cpu", rounds=1, contenders=names, model="demo", steps=("1x64",), out=out
            )
        )
    else:
        measure(TrainBenchmark(device="cuda", rounds=3, model="1.3b", out=out))


def train_layers(folder: Path, smoke: bool) -> None:
    from retentive.bench.train import TrainBenchmark, measure

    out = folder / "train-6.7b.json"
    if smoke:
        toy = {"model": "demo", "steps": ("1x64",), "layers": 2, "contenders": "retnet"}
        measure(TrainBenchmark(device="cpu", rounds=1, update=False, out=out, **toy))
    else:
        model = {"model": "6.7b", "layers": 4, "update": False}
        measure(TrainBenchmark(device="cuda", rounds=3, out=out, **model))


def decode(folder: Path, smoke: bool) -> None:
    _decode("1.3b", folder / "decode.json", smoke)


def decode_large(folder: Path, smoke: bool) -> None:
    _decode("6.7b", folder / "decode-6.7b.json", smoke)


def _decode(size: str, out: Path, smoke: bool) -> None:
    from retentive.bench.decode import DecodeBenchmark, measure

    if smoke:
        names = "retnet,transformer,transformer-gqa8"
        toy = {"model": ("demo",), "batches": (1,), "contexts": (64,), "tokens": 0}
        measure(DecodeBenchmark(device="cpu", rounds=1, contenders=names, out=out, **toy))
    else:
        measure(DecodeBenchmark(device="cuda", rounds=3, model=(size,), out=out))


STAGES: dict[str, Callable[[Path, bool], None]] = {
    "compile": compile_kernels,
    "tests": run_tests,
    "op": op,
    "train": train,
    "train-6.7b": train_layers,
    "decode": decode,
    "decode-6.7b": decode_large,
}


def main(argv: Sequence[str]) -> None:
    from retentive.errors import InputError

    name, folder, *rest = argv
    try:
        STAGES[name](Path(folder), rest == ["--smoke"])
    except InputError as reason:
        raise SystemExit(str(reason)) from None


if __name__ == "__main__":
    main(sys.argv[1:])
