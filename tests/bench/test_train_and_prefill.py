"""Training steps and prompts: what they count, and small runs from the command line."""

import json

import pytest
import zoo

from retentive.bench.command import main
from retentive.bench.train import batch_and_tokens
from retentive.errors import InputError
from retentive.models.counts import flops_per_token

OURS = "retnet,retnet-parallel,transformer,transformer-gqa"


def result_of(command, tiny_model, tmp_path, *options):
    out = tmp_path / f"{command}.json"
    shared = ["--model", tiny_model, "--rounds", "2", "--device", "cpu", "--contenders", OURS]
    assert main([command, *shared, *options, "--out", str(out)]) == 0
    return json.loads(out.read_text())["rows"]


def test_training(quick_limits, local_processes, tiny_model, tmp_path, capsys):
    rows = result_of("train", tiny_model, tmp_path, "--steps", "2x8", "1x32")
    assert [row["error"] for row in rows] == [None] * 8
    assert [row["case"] for row in rows[::4]] == [
        {"batch": 2, "tokens": 8},
        {"batch": 1, "tokens": 32},
    ]
    # The tiny model by hand: 12 D² in its layer, a head, and the mixing; three times two a weight.
    config = zoo.retnet(vocab_size=32, hidden_size=64, num_hidden_layers=1, num_heads=2)
    mixing = 2 * (2 * 64 * 96 + 4 * 32 * 64)
    assert flops_per_token(config) == 2 * (12 * 64**2 + 32 * 64) + mixing
    assert rows[0]["work"] == 3 * 16 * flops_per_token(config)
    assert rows[0]["tokens"] == 16 and rows[4]["tokens"] == 32
    assert "of GEMM rate" in capsys.readouterr().out
    assert (tmp_path / "train.png").exists()


def test_prefill(quick_limits, local_processes, tiny_model, tmp_path):
    rows = result_of("prefill", tiny_model, tmp_path, "--lengths", "20")
    assert [row["error"] for row in rows] == [None] * 4
    config = zoo.retnet(vocab_size=32, hidden_size=64, num_hidden_layers=1, num_heads=2)
    assert rows[0]["work"] == 20 * flops_per_token(config, head=False)


@pytest.mark.parametrize("step", ["4", "4x", "x512", "0x512", "4*512", "-1x2"])
def test_a_step_is_rows_and_tokens(step):
    assert batch_and_tokens("4x512") == (4, 512)
    with pytest.raises(InputError, match="sequences x tokens, such as 4x512"):
        batch_and_tokens(step)
