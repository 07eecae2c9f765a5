"""`benchmarks/gpu.sh` without a GPU: its plan, its clock, its report; once all of it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from retentive.bench.limits import Limits
from retentive.bench.op import OpBenchmark
from retentive.bench.results import Result, Row

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def script_module(name: str) -> Any:
    """A file of benchmarks/gpu, which is no package."""
    spec = importlib.util.spec_from_file_location(
        f"gpu_{name}", SCRIPT.with_suffix("") / f"{name}.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run, stages, report = map(script_module, ("run", "stages", "report"))
NOT_THERE = ("tyro", "rich", "pydantic", "matplotlib", "tokenizers", "transformers", "triton")


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PY": sys.executable}
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env=environment)


# The clock


def test_the_plan_needs_nothing_and_keeps_the_budget():
    shown = script("--plan", "--budget", "100")
    assert shown.returncode == 0, shown.stderr
    lines = [line.split() for line in shown.stdout.splitlines() if " s  " in line]
    assert [line[0] for line in lines] == [stage.name for stage in run.STAGES]
    assert abs(sum(float(line[1]) for line in lines) - 100) < len(lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "op,trian"], "unknown stage 'trian'; choose from compile, tests, op"),
        (["--peers", "nowhere"], "--peers nowhere is no folder; unpack the wheels"),
    ],
)
def test_bad_arguments_are_refused(arguments, words, capsys):
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert words in capsys.readouterr().err


def test_stages_that_hang_or_fail_cost_the_others_nothing(tmp_path, monkeypatch):
    """With a script in the place of python. Time that a stage leaves goes to those after it."""
    python = tmp_path / "python"
    does = 'case "$2" in op) sleep 60;; train) echo words; exit 3;; esac'
    python.write_text(f"#!/bin/sh\n{does}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    names = ("compile", "op", "train", "decode")
    chosen = [stage for stage in run.STAGES if stage.name in names]
    options = run.parse(["--out", str(tmp_path), "--budget", "5"])
    compiled, op, train, decode = run.run(chosen, tmp_path, options)
    assert compiled.state == decode.state == "done"
    assert op.state.startswith(f"stopped after {op.limit:.0f} s") and op.seconds < 30
    assert train.state == "failed with code 3\nwords"
    assert 5 * 130 / 340 < op.limit < 5 * 130 / 240


def test_peers_are_importable_and_their_ptxas_is_used(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    peers, scratch = tmp_path / "peers", tmp_path / "scratch"
    for folder in (peers / "nvidia" / "cu13" / "bin", peers / "fla", scratch):
        folder.mkdir(parents=True)
    (peers / "nvidia" / "cu13" / "bin" / "ptxas").write_text("#!/bin/sh\n")
    environment = run.stage_environment(scratch, peers)
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(peers)
    assert os.access(environment["TRITON_PTXAS_PATH"], os.X_OK)
    assert not any("fla" in line for line in run.missing(peers))
    assert any("missing: fla" in line for line in run.missing(scratch))


def test_the_processes_of_the_tests_have_every_test_once():
    names = [str(n) for n in range(10)]
    parts = stages.split(names, 4)
    assert sorted(name for part in parts for name in part) == sorted(names) and len(parts) == 4
    assert stages.split(["a"], 4) == [["a"]]


# The report


def row(contender: str, seconds: float, **case: int) -> Row:
    memory = {"start": 0, "peak": 2**30, "resident": 0}
    made = Row(contender, dict(case), "1", "form", "bfloat16", tokens=1000, memory=memory)
    made.samples, made.work, made.limit = [[seconds]], 50.0, 100.0
    return made


def saved(folder: Path, stage: str, *rows: Row) -> None:
    limits = Limits(torch.device("cpu"), torch.float32, [1.0], [5.0], [1.0])
    result = Result.new(stage.partition("-")[0], OpBenchmark(device="cpu"), limits)
    result.rows = list(rows)
    result.save(folder / f"{stage}.json")


def written(folder: Path, *names: str) -> tuple[dict, str]:
    runs = [{"name": n, "title": f"title of {n}", "state": "done", "seconds": 1} for n in names]
    runs[-1]["state"] = "stopped after 9 s\nlast | words"
    summary = {"stages": runs, "missing": ["missing: fla"], "smoke": False}
    (folder / "summary.json").write_text(json.dumps(summary))
    report.main(folder, folder)
    return json.loads((folder / "gpu.json").read_text()), (folder / "gpu.md").read_text()


def test_a_report_compares_the_results_with_the_targets(tmp_path):
    sizes = {"key_dim": 256, "batch": 4, "tokens": 8192}
    mine = row("retnet-triton", 1.0, **sizes)
    mine.roofline = {"design": 0.5, "floor": 0.25}
    peer = row("flash-linear-attention", 3.0, **sizes)
    step = row("retnet-triton", 1e-5, key_dim=256, batch=4, context=8192)
    lost = Row("attention", dict(sizes), error="out of memory")
    saved(tmp_path, "op", mine, peer, lost, step)
    saved(tmp_path, "decode-6.7b", row("retnet", 0.5, batch=1, context=8192))
    data, text = written(tmp_path, "op", "decode-6.7b", "train")
    assert [len(data["results"][name]["rows"]) for name in ("op", "decode-6.7b")] == [4, 1]
    lines = text.splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    targets = {line[0]: line[2] for line in cells if len(line) == 3}
    over = "op, forward + backward, K 256, V 512, T 8192, over flash-linear-attention"
    assert targets[over].startswith("3.00x; memory 1 GiB against 1 GiB")
    assert targets["the same against the roofline of this run"].startswith("50% of the design's")
    assert targets["decoding with 6.7B, of the memory read"].startswith("100% at batch 1")
    over = "training 1.3B at 8192 over flash-linear-attention's RetNet"
    assert targets[over].startswith("not measured")
    assert "    last | words" in lines and "- attention not run: out of memory" in text
    assert sum(line.startswith("| key_dim | batch | ") for line in lines) == 2  # the op, its step


def test_outcomes_are_those_that_were_logged(tmp_path):
    names = [f"tests/gpu/test_x.py::test_{n}" for n in ("a", "b[1-2 3]", "c", "d")]
    (tmp_path / "tests.txt").write_text("\n".join(names))
    log = [
        f"{names[0]} PASSED [ 50%]",
        f"{names[1]} FAILED [100%]",
        "E   tests are",
        "= 1 failed =",
    ]
    (tmp_path / "tests-0.log").write_text("\n".join(log))
    (tmp_path / "tests-1.log").write_text(f"{names[2]} SKIPPED (needs a CUDA GPU)\n")
    ended = report.outcomes(tmp_path)
    assert list(ended.values()) == ["passed", "failed", "skipped", "not run"]
    shown = report._tests(ended)
    assert "1 failed, 1 not run, 1 passed, 1 skipped" in shown and f"`{names[1]}`" in shown


# All of it


def test_nothing_beyond_torch_and_safetensors_is_needed(tmp_path):
    saved(tmp_path, "op", row("retnet-triton", 1.0, key_dim=256, batch=4, tokens=8192))
    code = f"""
import sys
for name in {NOT_THERE}: sys.modules[name] = None
from pathlib import Path
from retentive.bench import decode, op, train
from retentive.bench.workers import huggingface, ours
sys.path.insert(0, "benchmarks/gpu")
import fill_cache, report, run, run_tests, stages
options = decode.DecodeBenchmark(device="cuda"), train.TrainBenchmark(device="cuda")
assert options[0].model == ("1.3b",) and options[1].reference().config.hidden_size == 2048
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_whole_script_at_toy_sizes(tmp_path):
    done = script("--smoke", "--budget", "900", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert [stage["state"] for stage in data["stages"]] == ["done"] * len(run.STAGES)
    assert set(data["tests"].values()) <= {"skipped", "passed"} and data["tests"]
    rows = [row for result in data["results"].values() for row in result["rows"]]
    broken = {row["contender"]: row["error"] for row in rows if row["error"]}
    assert list(broken) == ["retnet-triton"] and "CUDA device" in broken["retnet-triton"]
    assert "not run: its kernels need a CUDA device" in (tmp_path / "gpu.md").read_text()
