"""The decoding benchmark: small runs from the command line."""

import json

import pytest
import zoo

from retentive.bench import along as bench_along
from retentive.bench.command import main
from retentive.errors import InputError
from retentive.models.checkpoint import save_model
from retentive.models.matching import matching_transformer
from retentive.models.retnet import RetNet
from retentive.models.transformer import Transformer

CONFIG = zoo.retnet(vocab_size=32, hidden_size=64, num_hidden_layers=1, num_heads=2)


def test_a_run_of_two_models_is_a_table_a_file_and_figures(
    quick_limits, local_processes, tiny_model, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(bench_along, "BLOCK_ROUNDS", 2)
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


def test_a_folder_of_another_kind_is_measured_beside_its_equals(
    quick_limits, local_processes, tmp_path
):
    save_model(Transformer(matching_transformer(CONFIG)), tmp_path / "mine")
    sizes = ["--contexts", "70", "--batches", "2", "--tokens", "0", "--rounds", "1"]
    names = ["--contenders", "model,retnet,transformer-gqa", "--device", "cpu"]
    out = tmp_path / "decode.json"
    model = ["--model", str(tmp_path / "mine")]
    assert main(["decode", *model, *sizes, *names, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["contender"] for row in rows] == ["model", "retnet", "transformer-gqa"]
    assert [row["error"] for row in rows] == [None] * 3
    assert rows[0]["form"] == "attention" and rows[1]["form"].startswith("recurrent")


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
