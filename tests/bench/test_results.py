"""Results: their arithmetic by hand, there and back through JSON, and two runs compared."""

import json
from dataclasses import asdict

import pytest
import torch

from retentive.bench import results, tables
from retentive.bench.limits import Limits
from retentive.bench.op import OpBenchmark
from retentive.bench.results import FORMAT, Result, Row, compare, load
from retentive.errors import InputError


def row(contender="retnet", seconds=2.0, limit=100.0, **case) -> Row:
    samples = [[seconds], [seconds / 2, seconds, 10 * seconds], [4 * seconds, 4 * seconds]]
    memory = {"start": 10, "peak": 25, "resident": 20}
    case = case or {"tokens": 64}
    made = Row(contender, case, "1", "chunkwise", "float32", tokens=64, memory=memory)
    made.samples, made.work, made.limit = samples, 50.0, limit
    return made


def result(*rows: Row) -> Result:
    limits = Limits(torch.device("cpu"), torch.float32, [1.0, 3.0], [5.0])
    made = Result.new("op", OpBenchmark(device="cpu"), limits)
    made.rows = list(rows)
    return made


def test_medians_of_rounds():
    assert row().seconds == 2.0
    assert row().spread == (1.0, 4.0)
    assert row().rate == 32.0
    assert row().fraction == 50 / 2 / 100
    assert row().added_bytes == 15


def test_there_and_back(tmp_path):
    made = result(row(), Row("torchscale", {"tokens": 64}, error="out of memory"))
    made.save(tmp_path / "op.json")
    assert load(tmp_path / "op.json", "op") == made
    written = json.loads((tmp_path / "op.json").read_text())
    assert written["format"] == FORMAT and written["machine"]["torch"] == torch.__version__
    assert written["limits"] == {
        "gemm_flops": [1.0, 3.0],
        "linear_flops": [],
        "stream_bytes": [5.0],
    }


def test_a_comparison_takes_the_machines_speed_out(capsys):
    """Now half the seconds on a machine twice as fast: nothing has changed. The other has."""
    old = result(row(seconds=2.0, limit=100.0), row("torchscale", seconds=2.0, limit=100.0))
    new = result(row(seconds=1.0, limit=200.0), row("torchscale", seconds=0.5, limit=200.0))
    new.rows.append(row("new", tokens=64))
    new.rows.append(Row("retnet", {"tokens": 128}, error="out of memory"))
    assert [(r.contender, ratio) for r, ratio in compare(old, new)] == [
        ("retnet", 1.0),
        ("torchscale", 2.0),
    ]
    old.machine = {**old.machine, "torch": "1.0"}
    tables.show_comparison(old, new)
    shown = capsys.readouterr().out
    assert "2.00x" in shown and "torch 1.0 before" in shown


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 1}, "result of bench op, format 1; this is bench op, format 3"),
        ({"benchmark": "train"}, "result of bench train, format 3; this is bench op"),
    ],
)
def test_other_results_are_refused(tmp_path, change, words):
    path = tmp_path / "old.json"
    path.write_text(json.dumps({**asdict(result(row())), **change}))
    with pytest.raises(InputError, match=words):
        load(path, "op")


def test_a_result_of_the_format_before_is_read(tmp_path):
    path, made = tmp_path / "old.json", result(row())
    fields = {**asdict(made), "format": 2}
    for written in fields["rows"]:
        del written["roofline"]
    path.write_text(json.dumps(fields))
    assert load(path, "op") == made


@pytest.mark.parametrize("text", ["{", "[]", "{}", "3"])
def test_what_is_no_result_is_refused(tmp_path, text):
    (tmp_path / "old.json").write_text(text)
    with pytest.raises(InputError, match="holds no benchmark's result"):
        load(tmp_path / "old.json", "op")


def test_the_tools_that_make_kernels_have_versions():
    tools = results.kernel_tools(9, 0)
    assert all(tools[name][0].isdigit() for name in ("triton", "ptxas"))
