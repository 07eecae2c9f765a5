"""`benchmarks/gpu.sh` without a GPU: its plan and clock, what it reads and writes; once all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from retentive.bench import gpu, gpu_report, gpu_stages, measure, processes, results
from retentive.bench.contenders import Entry, chosen
from retentive.bench.limits import Limits
from retentive.bench.measure import measure_case
from retentive.bench.models import Subject
from retentive.bench.op import OpBenchmark
from retentive.bench.processes import Kept
from retentive.bench.results import Result, Row
from retentive.bench.workers import ours
from retentive.models.config import RetNetConfig

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
NOT_THERE = ("tyro", "rich", "pydantic", "matplotlib", "tokenizers", "transformers", "triton")


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PY": sys.executable}
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env=environment)


# The clock


def test_the_plan_needs_nothing_and_keeps_the_budget():
    shown = script("--plan", "--budget", "100")
    assert shown.returncode == 0, shown.stderr
    lines = [line.split() for line in shown.stdout.splitlines() if " s  " in line]
    assert [line[0] for line in lines] == [stage.name for stage in gpu.STAGES]
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
        gpu.main(arguments)
    assert words in capsys.readouterr().err


def test_stages_that_hang_or_fail_cost_the_others_nothing(tmp_path, monkeypatch):
    """By a python made up here. What a stage leaves of its time goes to those after it."""
    python = tmp_path / "python"
    does = 'case "$3" in op) sleep 60;; train) echo words; exit 3;; esac'
    python.write_text(f"#!/bin/sh\n{does}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    stages = [stage for stage in gpu.STAGES if stage.name in ("compile", "op", "train", "decode")]
    options = gpu.parsed(["--out", str(tmp_path), "--budget", "5"])
    compiled, op, train, decode = gpu.run(stages, tmp_path, options)
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
    environment = gpu.prepared(scratch, peers)
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(peers)
    assert os.access(environment["TRITON_PTXAS_PATH"], os.X_OK)
    assert not any("fla" in line for line in gpu.missing(peers))
    assert any("missing: fla" in line for line in gpu.missing(scratch))


def test_shares_have_every_test_once():
    names = [str(n) for n in range(10)]
    shares = gpu_stages.shares(names, 4)
    assert sorted(name for share in shares for name in share) == sorted(names) and len(shares) == 4
    assert gpu_stages.shares(["a"], 4) == [["a"]]


# The report


def row(contender: str, seconds: float, **case: int) -> Row:
    memory = {"start": 0, "peak": 2**30, "resident": 0}
    made = Row(contender, dict(case), "1", "form", "bfloat16", tokens=1000, memory=memory)
    made.samples, made.work, made.limit = [[seconds]], 50.0, 100.0
    return made


def saved(folder: Path, stage: str, *rows: Row) -> None:
    limits = Limits(torch.device("cpu"), torch.float32, [1.0], [5.0], [1.0])
    result = Result.begun(stage.partition("-")[0], OpBenchmark(device="cpu"), limits)
    result.rows = list(rows)
    result.save(folder / f"{stage}.json")


def report(folder: Path, *names: str) -> tuple[dict, str]:
    ran = [{"name": n, "title": f"what {n} is", "state": "done", "seconds": 1} for n in names]
    ran[-1]["state"] = "stopped after 9 s\nlast | words"
    told = {"stages": ran, "missing": ["missing: fla"], "smoke": False}
    (folder / "ran.json").write_text(json.dumps(told))
    gpu_report.main(folder, folder)
    return json.loads((folder / "gpu.json").read_text()), (folder / "gpu.md").read_text()


def test_a_report_holds_what_there_is_against_what_was_asked_for(tmp_path):
    sizes = {"key_dim": 256, "batch": 4, "tokens": 8192}
    mine = row("retnet-triton", 1.0, **sizes)
    mine.roofline = {"design": 0.5, "floor": 0.25}
    peer = row("flash-linear-attention", 3.0, **sizes)
    step = row("retnet-triton", 1e-5, key_dim=256, batch=4, context=8192)
    lost = Row("attention", dict(sizes), error="out of memory")
    saved(tmp_path, "op", mine, peer, lost, step)
    saved(tmp_path, "decode-6.7b", row("retnet", 0.5, batch=1, context=8192))
    written, text = report(tmp_path, "op", "decode-6.7b", "train")
    assert [len(written["results"][name]["rows"]) for name in ("op", "decode-6.7b")] == [4, 1]
    lines = text.splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    bars = {line[0]: line[2] for line in cells if len(line) == 3}
    over = "op, forward + backward, K 256, V 512, T 8192, over flash-linear-attention"
    assert bars[over].startswith("3.00x; memory 1.00 GiB against 1.00 GiB")
    assert bars["the same against the roofline of this run"].startswith("50% of the design's")
    assert bars["decoding with 6.7B, of the memory read"].startswith("100% at batch 1")
    over = "training 1.3B at 8192 over flash-linear-attention's RetNet"
    assert bars[over].startswith("not measured")
    assert "    last | words" in lines and "- attention not run: out of memory" in text
    assert sum(line.startswith("| key_dim | batch | ") for line in lines) == 2  # the op, its step


def test_what_kernels_are_made_by_is_told():
    made_by = results.on_gpu(9, 0)
    assert all(made_by[name][0].isdigit() for name in ("triton", "ptxas"))


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
    ended = gpu_report.outcomes(tmp_path)
    assert list(ended.values()) == ["passed", "failed", "skipped", "not run"]
    told = gpu_report._tests(ended)
    assert "1 failed, 1 not run, 1 passed, 1 skipped" in told and f"`{names[1]}`" in told


# Processes that are kept, and steps that are recorded


def test_kept_processes_serve_case_after_case(quick_limits, local_processes, monkeypatch):
    begun, rested = [], []

    class Counted(measure.Process):  # the fixture's, in this process
        def __init__(self, worker: str, threads: int):
            begun.append(worker)
            super().__init__(worker, threads)

        def rest(self) -> None:
            rested.append(self)

    monkeypatch.setattr(processes, "Process", Counted)
    entries = [Entry(contender) for contender in chosen("op", "retnet,attention")]
    case = {"task": "op", "device": "cpu", "dtype": "float32", "threads": 1, "tokens": 64}
    case |= {"batch": 2, "heads": 1, "key_dim": 8, "value_dim": 8}
    limits, kept = Limits(torch.device("cpu"), torch.float32), Kept()
    for apart in (False, True):
        rows = measure_case(case, entries, 2, limits, sizes=["tokens"], kept=kept, apart=apart)
        assert [row.error for row in rows] == [None, None]
        assert [len(row.samples) for row in rows] == [2, 2]
    assert begun == ["ours", "ours"] and len(rested) == 4
    assert len(limits.gemm_rates) == 2 + 4  # rounds together, then of each


@pytest.mark.parametrize("name", ["transformer", "transformer-gqa8"])
def test_a_recorded_step_is_the_step_behind_its_context(name):
    small = RetNetConfig(vocab_size=32, hidden_size=512, num_hidden_layers=2, num_heads=2)
    (contender,) = chosen("decode", name)
    case = Entry(contender, Subject("small", small)).case(
        {"task": "decode", "device": "cpu", "dtype": "float32", "threads": 1}
    )
    made, tokens = ours.Ours(case), torch.tensor([3, 5])
    with torch.inference_mode():
        decoder = ours.CacheDecoder.empty(made.model, 2, 70 + 1)
        decoder.skip(70)
        recorded = ours.RecordedDecoder(decoder, lambda step: step)
        first, again = recorded(tokens), recorded(tokens)
        assert torch.equal(first, again) and torch.equal(first, decoder(tokens))
    assert decoder.sdpa_kernel.endswith(("attention", "math"))
    case = {**case, "tokens": 16}
    assert ours.training_kernel(made.model, case).endswith(("attention", "math"))


# All of it


def test_nothing_beyond_torch_and_safetensors_is_needed(tmp_path):
    saved(tmp_path, "op", row("retnet-triton", 1.0, key_dim=256, batch=4, tokens=8192))
    code = f"""
import sys
for name in {NOT_THERE}: sys.modules[name] = None
from pathlib import Path
from retentive.bench import decode, gpu_stages, op, train
from retentive.bench.workers import huggingface, ours, compile
gpu_stages.op.__globals__["os"]
options = decode.DecodeBenchmark(device="cuda"), train.TrainBenchmark(device="cuda")
assert options[0].model == ("1.3b",) and options[1].subject().config.hidden_size == 2048
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_whole_script_at_toy_sizes(tmp_path):
    done = script("--smoke", "--budget", "900", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [stage["state"] for stage in written["stages"]] == ["done"] * len(gpu.STAGES)
    assert set(written["tests"].values()) <= {"skipped", "passed"} and written["tests"]
    rows = [row for result in written["results"].values() for row in result["rows"]]
    broken = {row["contender"]: row["error"] for row in rows if row["error"]}
    assert list(broken) == ["retnet-triton"] and "CUDA device" in broken["retnet-triton"]
    assert "not run: its kernels need a CUDA device" in (tmp_path / "gpu.md").read_text()
