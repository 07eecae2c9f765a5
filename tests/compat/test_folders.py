"""What was written before configs were nested opens, and means the same: folders, states, runs.

`fixtures/` was written by `make.py` with the code of then; bits differ between processors, so
logits and weights are held to 1e-11 in float64.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from retentive.adapters.loading import load_adapted
from retentive.cli import main
from retentive.data.tokenizer import byte_tokenizer
from retentive.inference.session import Session
from retentive.models.checkpoint import fingerprint, load, load_state, save_model
from retentive.train.config import load_config

FIXTURES = Path(__file__).parent / "fixtures"
MODELS = sorted(path.name for path in (FIXTURES / "models").iterdir())
LOGITS = load_file(FIXTURES / "logits.safetensors")
EXACT = {"rtol": 0.0, "atol": 1e-11}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_folder_is_read_and_written_as_before(name, tmp_path):
    folder = FIXTURES / "models" / name
    model = load(folder)
    facts = json.loads((FIXTURES / "models.json").read_text())
    assert fingerprint(model) == facts[name]["fingerprint"]  # states are tied to it
    save_model(model, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("int")])
@torch.no_grad()
def test_its_logits_are_as_before(name):
    logits, _ = load(FIXTURES / "models" / name, dtype="float64")(LOGITS["tokens"])
    torch.testing.assert_close(logits[..., :16], LOGITS[name], **EXACT)


@torch.no_grad()
def test_a_tuned_initial_state_is_as_before():
    model = load_adapted(FIXTURES / "models" / "retnet", FIXTURES / "tuned", dtype="float64")
    logits, _ = model(LOGITS["tokens"])
    torch.testing.assert_close(logits[..., :16], LOGITS["tuned"], **EXACT)


@pytest.mark.parametrize("name", ["retnet", "hybrid", "transformer"])
def test_a_saved_session_goes_on_with_the_same_tokens(name):
    model = load(FIXTURES / "models" / name, dtype="float64")
    session = Session.load(FIXTURES / f"{name}.state", model, byte_tokenizer())
    pieces = [[[*piece] for piece in step] for step in session.steps(8)]
    assert pieces == json.loads((FIXTURES / f"{name}.pieces.json").read_text())
    state, _, _ = load_state(FIXTURES / f"{name}.state", model)
    assert state.batch_size == 2


@pytest.mark.parametrize("name", ["run-retnet", "run-transformer"])
def test_a_stopped_run_resumes_to_the_same_weights(name, tmp_path, monkeypatch):
    """Its TOML and its record have flat keys."""
    for given in ("corpus.txt", f"{name}.toml", name):
        copy = shutil.copytree if (FIXTURES / given).is_dir() else shutil.copy
        copy(FIXTURES / given, tmp_path / given)
    monkeypatch.chdir(tmp_path)
    assert main(["train", f"{name}.toml", "--out", name, "--resume"]) == 0
    final = load_file(FIXTURES / f"{name}.final.safetensors")
    for key, weight in load_file(tmp_path / name / "model.safetensors").items():
        torch.testing.assert_close(weight, final[key], **EXACT)


def test_flat_and_nested_keys_are_the_same_model(tmp_path):
    flat = (FIXTURES / "run-retnet.toml").read_text()
    nested = flat.replace("num_heads = 2\ngated_ffn = true\n", "").replace(
        "[data]", "[model.mixer]\nnum_heads = 2\n[model.ffn]\ngated = true\n\n[data]"
    )
    assert nested != flat
    (tmp_path / "flat.toml").write_text(flat)
    (tmp_path / "nested.toml").write_text(nested)
    made = [load_config(tmp_path / f"{name}.toml").model.build(257) for name in ("flat", "nested")]
    assert made[0] == made[1]
    changed = load_config(tmp_path / "flat.toml", {"model.ffn.gated": ["false"]})
    assert not changed.model.build(257).ffn.gated
    changed = load_config(tmp_path / "nested.toml", {"model.num_heads": ["1"]})
    assert changed.model.build(257).mixer.num_heads == 1
