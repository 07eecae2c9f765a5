"""What a stage of `benchmarks/gpu.sh` does: `python -m retentive.bench.gpu_stages STAGE FOLDER`.

A benchmark writes its result to FOLDER/STAGE.json as it goes; tests write logs, a line a test.
`--smoke` takes toy sizes on the CPU, with the same code.
"""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

TEST_PROCESSES = 6  # of the tests at once: each compiles and times tiles of its own
DTYPES = {"bfloat16": 8, "float16": 8, "float32": 2}
"""Of our kernels, with the most tile sizes that one has (`kernels.triton.configs`)."""
TESTS = "tests/gpu"


def compile_kernels(folder: Path, smoke: bool) -> None:
    """Fills Triton's cache on disk for the stages after it, a process for each part of the kernels.

    One after the other they would take minutes: every stage would spend its time on them.
    """
    work = [] if smoke else compile_work()
    with ThreadPoolExecutor(max(2, (os.cpu_count() or 4) - 2)) as pool:
        list(pool.map(_compile, work))


def compile_work() -> list[list[str]]:
    """The arguments of `workers.compile`, the longest first."""
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
    module = [sys.executable, "-m", "retentive.bench.workers.compile"]
    done = subprocess.run([*module, *arguments], capture_output=True, text=True)
    last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
    print(*arguments, "compiled" if done.returncode == 0 else f"failed: {last}", flush=True)


def run_tests(folder: Path, smoke: bool) -> None:
    """All tests marked gpu, shared out among processes; each logs to FOLDER/tests-N.log."""
    for needed in ("pytest", "hypothesis"):
        if find_spec(needed) is None:
            raise SystemExit(f"{needed} is not installed: the tests do not run")
    # The machine's other plugins, and what its versions warn of, are no concern of these tests.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    module = "retentive.bench.workers.tests"
    pytest = [sys.executable, "-m", module, "-m", "gpu", "-W", "default"]
    listed = subprocess.run(
        [*pytest, "--collect-only", "-q", TESTS], capture_output=True, text=True
    )
    names = [line for line in listed.stdout.splitlines() if "::" in line]
    if not names:
        raise SystemExit(f"no tests found: {(listed.stdout + listed.stderr).strip()[-500:]}")
    (folder / "tests.txt").write_text("\n".join(names))
    count = 1 if smoke else TEST_PROCESSES
    running = []
    for number, share in enumerate(shares(names, count)):
        log = (folder / f"tests-{number}.log").open("w")
        running.append(subprocess.Popen([*pytest, "-v", *share], stdout=log, stderr=log))
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit(f"pytest ended with {max(codes)}")


def shares(names: Sequence[str], count: int) -> list[list[str]]:
    """Neighbours differ in length and dtype, so each share gets about as much of either."""
    return [list(names[n::count]) for n in range(min(count, len(names)))]


def op(folder: Path, smoke: bool) -> None:
    from retentive.bench.op import OpBenchmark, measured

    out = folder / "op.json"
    if not smoke:
        measured(OpBenchmark(device="cuda", rounds=3, out=out))
        return
    names = "retnet,attention,retnet-triton"
    sizes = {"heads": 1, "key_dim": (16, 8), "lengths": (64,), "tokens": 128}
    toy = OpBenchmark(device="cpu", rounds=1, contenders=names, step=True, out=out, **sizes)
    measured(toy)


def train(folder: Path, smoke: bool) -> None:
    from retentive.bench.train import TrainBenchmark, measured

    out = folder / "train.json"
    if smoke:
        names = "retnet,transformer"
        measured(
            TrainBenchmark(
                device="cpu", rounds=1, contenders=names, model="demo", steps=("1x64",), out=out
            )
        )
    else:
        measured(TrainBenchmark(device="cuda", rounds=3, model="1.3b", out=out))


def train_layers(folder: Path, smoke: bool) -> None:
    from retentive.bench.train import TrainBenchmark, measured

    out = folder / "train-6.7b.json"
    if smoke:
        toy = {"model": "demo", "steps": ("1x64",), "layers": 2, "contenders": "retnet"}
        measured(TrainBenchmark(device="cpu", rounds=1, update=False, out=out, **toy))
    else:
        how = {"model": "6.7b", "layers": 4, "update": False}
        measured(TrainBenchmark(device="cuda", rounds=3, out=out, **how))


def decode(folder: Path, smoke: bool) -> None:
    _decode("1.3b", folder / "decode.json", smoke)


def decode_large(folder: Path, smoke: bool) -> None:
    _decode("6.7b", folder / "decode-6.7b.json", smoke)


def _decode(size: str, out: Path, smoke: bool) -> None:
    from retentive.bench.decode import DecodeBenchmark, measured

    if smoke:
        names = "retnet,transformer,transformer-gqa8"
        toy = {"model": ("demo",), "batches": (1,), "contexts": (64,), "tokens": 0}
        measured(DecodeBenchmark(device="cpu", rounds=1, contenders=names, out=out, **toy))
    else:
        measured(DecodeBenchmark(device="cuda", rounds=3, model=(size,), out=out))


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
