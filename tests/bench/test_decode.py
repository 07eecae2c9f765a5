"""The decoding benchmark: drift by hand, and a small run from the command line."""

import json

import pytest

from retentive.bench.command import main
from retentive.bench.decode import drifts
from retentive.demo.decode import Measure
from retentive.errors import InputError
from retentive.models.checkpoint import save_model
from retentive.models.config import RetNetConfig, TransformerConfig
from retentive.models.retnet import RetNet
from retentive.models.transformer import Transformer


def test_drift_is_the_last_quarter_over_the_first():
    seconds = [1.0, 1.0, 9.0, 9.0, 9.0, 9.0, 1.5, 1.5]
    measures = [Measure(n, s, 0, 100 + 25 * (n >= 6)) for n, s in enumerate(seconds)]
    assert drifts(measures) == {"seconds": 1.5, "resident": 1.25}


def test_a_run_is_a_table_and_a_file(tmp_path, capsys):
    config = RetNetConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_heads=2)
    save_model(RetNet(config), tmp_path / "model")
    out = tmp_path / "decode.json"
    model = str(tmp_path / "model")
    assert main(["decode", "--model", model, "--tokens", "1024", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    positions = [at["position"] for at in result["measures"]]
    assert positions[0] == 64 and positions[-1] == 1024
    assert len({at["state"] for at in result["measures"]}) == 1
    assert "last quarter over first" in capsys.readouterr().out


def test_a_transformer_is_refused(tmp_path):
    config = RetNetConfig(vocab_size=32, hidden_size=64, num_hidden_layers=1, num_heads=2)
    save_model(Transformer(TransformerConfig.matching(config)), tmp_path)
    with pytest.raises(InputError, match="holds no RetNet"):
        main(["decode", "--model", str(tmp_path)])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--tokens", "5"], "at least 1024, got 5"),
        (["--model", "demoo"], "did you mean 'demo'"),
    ],
)
def test_bad_options_are_refused(argv, words):
    with pytest.raises(InputError, match=words):
        main(["decode", *argv])
