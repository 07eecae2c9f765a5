"""The paper's table and figure at a size of seconds, with a budget and without."""

import json

import pytest

from retentive.bench import measure, paper
from retentive.bench.command import main
from retentive.errors import InputError

SMALL = ["--lengths", "16", "32", "--contexts", "70", "140", "--batches", "1", "2"]


def run(tiny_model, out, *options):
    shared = ["--size", tiny_model, "--rounds", "2", "--device", "cpu", "--out", str(out)]
    assert main(["paper", *shared, *SMALL, *options]) == 0
    return json.loads(out.read_text())


def test_everything_without_a_budget(quick_limits, local_processes, tiny_model, tmp_path, capsys):
    result = run(tiny_model, tmp_path / "paper.json")
    assert all(row["error"] is None for row in result["rows"])
    cases = [tuple(row["case"].items()) for row in result["rows"]]
    assert set(cases) == {
        *((("batch", 1), ("tokens", n)) for n in (16, 32)),
        *((("batch", 1), ("context", n)) for n in (70, 140)),
        (("batch", 2), ("context", 70)),
    }
    assert cases[0] == (("batch", 1), ("context", 140))  # the most important
    names = {row["contender"] for row in result["rows"] if "tokens" in row["case"]}
    assert names == {"retnet", "transformer", "transformer-math"}
    assert result["more"] == {"left_out": [], "refused": []}
    shown = capsys.readouterr().out
    assert shown.count("GFLOP/s") == 1  # how it was measured is printed once
    assert "Table 4" in shown and "Figure 6" in shown
    figures = {path.name for path in tmp_path.glob("*.png")}
    assert figures == {
        "paper-training.png",
        "paper-context-batch-1.png",
        "paper-batch-context-70.png",
    }


def test_what_does_not_fit_the_budget_is_named(
    quick_limits, local_processes, tiny_model, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(paper, "STARTING", 100.0)
    result = run(tiny_model, tmp_path / "paper.json", "--budget", "20", "--contenders", "retnet")
    assert result["rows"] == [] and len(result["more"]["left_out"]) == 5
    shown = capsys.readouterr().out
    assert "left out for the budget: decode batch 1, context 140, about" in shown


def test_a_cell_that_does_not_fit_the_memory_is_not_the_end(
    quick_limits, local_processes, tiny_model, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(measure, "available_bytes", lambda device: 600_000)
    result = run(tiny_model, tmp_path / "paper.json", "--contenders", "retnet")
    assert {"context"} <= {name for row in result["rows"] for name in row["case"]}
    assert all("does not fit" in reason for reason in result["more"]["refused"])
    assert "refused: batch 1, tokens 32: does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--budget", "3"], "budget must be at least 10, got 3"),
        (["--size", "2.3b"], r"unknown model '2.3b' .did you mean"),
        (["--contenders", "lama"], r"'lama' of bench decode .did you mean 'llama'"),
        (["--lengths"], "missing value|--lengths is empty"),
    ],
)
def test_bad_options_are_refused(argv, words):
    with pytest.raises(InputError, match=words):
        main(["paper", *argv])
