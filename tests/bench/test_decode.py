"""The decoding benchmark: drift by hand, the turns, and a small run from the command line."""

import json

import pytest
import zoo

from retentive.bench import decode
from retentive.bench.command import main
from retentive.errors import InputError
from retentive.models.checkpoint import save_model
from retentive.models.matching import matching_transformer
from retentive.models.retnet import RetNet
from retentive.models.transformer import Transformer

CONFIG = zoo.retnet(vocab_size=32, hidden_size=64, num_hidden_layers=1, num_heads=2)


def test_drift_is_the_last_quarter_over_the_first():
    assert decode.drift([1.0, 1.0, 9.0, 9.0, 9.0, 9.0, 1.5, 1.5]) == 1.5


def test_marks_rise_to_the_last_token():
    marks = decode.marks_along(16384)
    assert marks[0] == 128 and marks[-1] == 16384 and len(marks) == decode.MARKS
    assert marks == sorted(set(marks))


def test_blocks_are_timed_in_turn(monkeypatch):
    monkeypatch.setattr(decode, "BLOCK_ROUNDS", 2)
    order = []
    samples = decode.in_turn(3, lambda at: order.append(at) or [float(at)])
    assert order == [0, 1, 2, 2, 1, 0]
    assert samples == [[[float(at)]] * 2 for at in range(3)]


def test_a_run_of_two_models_is_a_table_a_file_and_figures(
    quick_limits, local_processes, tiny_model, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(decode, "BLOCK_ROUNDS", 2)
    save_model(RetNet(CONFIG), tmp_path / "mine")
    out = tmp_path / "decode.json"
    models = ["--model", tiny_model, "--model", str(tmp_path / "mine")]
    cases = ["--contexts", "70", "140", "--batches", "1", "--tokens", "1024", "--rounds", "2"]
    names = ["--contenders", "retnet,transformer", "--device", "cpu"]
    assert main(["decode", *models, *cases, *names, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    rows = result["rows"]
    assert [row["contender"] for row in rows[:3]] == ["retnet tiny", "transformer", "retnet mine"]
    assert [row["error"] for row in rows] == [None] * 6
    assert rows[0]["memory"]["state"] == rows[3]["memory"]["state"] == 2 * 32 * 64 * 4
    assert rows[4]["memory"]["state"] == 2 * rows[1]["memory"]["state"]
    along = result["more"]["along"]
    assert along["measures"][-1]["position"] == 1024
    assert len({at["state"] for at in along["measures"]}) == 1
    assert len(along["samples"]) == len(along["seconds"]) == len(along["measures"])
    assert "Last quarter over first" in capsys.readouterr().out
    for name in ("decode-context-batch-1", "decode-along"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{name}.svg").exists()


def test_a_transformer_is_refused(tmp_path):
    save_model(Transformer(matching_transformer(CONFIG)), tmp_path)
    with pytest.raises(InputError, match="holds no RetNet"):
        main(["decode", "--model", str(tmp_path)])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--tokens", "5"], "at least 1024, or 0 for none, got 5"),
        (["--model", "demoo"], "unknown model 'demoo' .did you mean 'demo'"),
        (["--contexts", "0"], "contexts must be at least 1, got 0"),
        (
            ["--contenders", "lama"],
            "contender 'lama' of bench decode .did you mean 'llama'",
        ),
    ],
)
def test_bad_options_are_refused(argv, words):
    with pytest.raises(InputError, match=words):
        main(["decode", *argv])
