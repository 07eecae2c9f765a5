"""`benchmarks/gpu.sh`: everything that needs a GPU, stage by stage, within a budget of seconds.

Each stage is a process with a time limit of its own (`stages.py`): one that hangs, dies or finds a
package missing costs the others nothing. Each writes its measurements to disk as they come, and the
report (`report.py`) is written anew after each. This file needs nothing but Python, so that it can
show the plan anywhere.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
BUDGET = 510.0  # of 540 seconds; the rest is for starting and stopping
LOG_LINES = 12  # of a failed stage, shown in the report


@dataclass(frozen=True)
class Stage:
    name: str
    title: str
    share: float
    """Of the time, against the others'; a stage leaves the rest of it to those after it."""


STAGES = (  # the most important first
    Stage("compile", "kernels compiled, on all cores at once", 100),
    Stage("tests", "pytest -m gpu", 110),
    Stage("op", "the op and its decoding step", 130),
    Stage("train", "training steps of 1.3B at 8192", 60),
    Stage("decode", "decoding with 1.3B at 8192", 50),
    Stage("train-6.7b", "four layers of 6.7B at 8192, forward and backward only", 45),
    Stage("decode-6.7b", "decoding with 6.7B at 8192", 60),
)


@dataclass
class StageRun:
    name: str
    title: str
    state: str = "not started"
    seconds: float = 0.0
    limit: float = 0.0


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    stages = [stage for stage in STAGES if stage.name in (options.only or [stage.name])]
    for line in missing(options.peers):
        print(line)
    if options.plan:
        print(plan(stages, options.budget))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        runs = run(stages, Path(scratch), options)
    print(f"written: {options.out / 'gpu.json'}, {options.out / 'gpu.md'}")
    return 0 if all(one.state == "done" for one in runs) else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT", "gpu-results")),
        help="folder of gpu.json and gpu.md",
    )
    parser.add_argument("--peers", type=Path, help="unpacked wheels: flash-linear-attention, ptxas")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of all stages")
    parser.add_argument("--only", type=_names, help="stages, with commas between")
    parser.add_argument("--plan", action="store_true", help="print the stages and exit")
    parser.add_argument("--smoke", action="store_true", help="all stages on the CPU, at toy sizes")
    options = parser.parse_args(argv)
    if options.peers is not None and not options.peers.is_dir():
        parser.error(f"--peers {options.peers} is no folder; unpack the wheels into one")
    return options


def _names(given: str) -> list[str]:
    names, known = given.split(","), [stage.name for stage in STAGES]
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(
            f"unknown stage {unknown[0]!r}; choose from {', '.join(known)}"
        )
    return names


def missing(peers: Path | None) -> list[str]:
    """A line for each package that is not there, with the consequence."""
    path = [] if peers is None else [str(peers)]
    found = {name: find_spec(name) is not None for name in ("triton", "pytest", "hypothesis")}
    found["fla"] = any((Path(folder) / "fla").is_dir() for folder in [*path, *sys.path])
    consequence = {
        "triton": "our kernels do not run",
        "pytest": "the tests of `pytest -m gpu` do not run",
        "hypothesis": "the tests of `pytest -m gpu` do not run",
        "fla": "the rows of flash-linear-attention are missing (--peers DIR)",
    }
    return [f"missing: {name}: {consequence[name]}" for name, there in found.items() if not there]


def plan(stages: Sequence[Stage], budget: float) -> str:
    total = sum(stage.share for stage in stages)
    lines = [
        f"{stage.name:12} {budget * stage.share / total:4.0f} s  {stage.title}" for stage in stages
    ]
    heading = f"{budget:.0f} seconds; each stage has at most, and the time that others leave:"
    return "\n".join([heading, *lines])


def run(stages: Sequence[Stage], scratch: Path, options: argparse.Namespace) -> list[StageRun]:
    runs = [StageRun(stage.name, stage.title) for stage in stages]
    environment = stage_environment(scratch, options.peers)
    deadline = time.monotonic() + options.budget
    writing = None
    for number, (stage, one) in enumerate(zip(stages, runs, strict=True)):
        later = sum(other.share for other in stages[number:])
        one.limit = (deadline - time.monotonic()) * stage.share / later
        print(f"{stage.name}: {stage.title}, at most {one.limit:.0f} s", flush=True)
        began = time.monotonic()
        one.state = run_stage(stage.name, scratch, one.limit, environment, options.smoke)
        one.seconds = time.monotonic() - began
        print(f"{stage.name}: {one.state.splitlines()[0]}, {one.seconds:.0f} s", flush=True)
        if writing is not None:
            writing.wait()
        writing = write_report(runs, scratch, options, environment)
    if writing is not None:
        writing.wait()
    return runs


def stage_environment(scratch: Path, peers: Path | None) -> dict[str, str]:
    """Variables of the stages: the peers can be imported, and a ptxas among them is used."""
    environment = {**os.environ, "RETENTIVE_BENCH_ANY_PTXAS": "1"}
    if peers is None:
        return environment
    path = [str(peers.resolve()), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    found = next(iter(sorted(peers.rglob("bin/ptxas"))), None)
    if found is not None and "TRITON_PTXAS_PATH" not in environment:
        ptxas = scratch / "ptxas"
        shutil.copy(found, ptxas)
        ptxas.chmod(0o755)  # unpacking may have lost that
        environment["TRITON_PTXAS_PATH"] = str(ptxas)
    return environment


def run_stage(
    name: str, scratch: Path, limit: float, environment: dict[str, str], smoke: bool
) -> str:
    """ "done", or the reason why it ended early, with the end of its log."""
    command = [sys.executable, str(HERE / "stages.py"), name, str(scratch)]
    with (scratch / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            [*command, *(["--smoke"] if smoke else [])],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=max(1.0, limit))
        except subprocess.TimeoutExpired:
            code = None
        finally:  # with the contenders' processes, should some be left
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    if code == 0:
        return "done"
    lines = (scratch / f"{name}.log").read_text(errors="replace").splitlines()[-LOG_LINES:]
    reason = f"stopped after {limit:.0f} s" if code is None else f"failed with code {code}"
    return "\n".join([reason, *lines])


def write_report(
    runs: Sequence[StageRun],
    scratch: Path,
    options: argparse.Namespace,
    environment: dict[str, str],
) -> "subprocess.Popen[bytes]":
    """In a process beside the next stage, since it takes seconds to import torch."""
    summary = {
        "stages": [asdict(one) for one in runs],
        "missing": missing(options.peers),
        "smoke": options.smoke,
    }
    (scratch / "summary.json").write_text(json.dumps(summary))
    command = [sys.executable, str(HERE / "report.py"), str(scratch), str(options.out)]
    return subprocess.Popen(command, env=environment)


if __name__ == "__main__":
    raise SystemExit(main())
