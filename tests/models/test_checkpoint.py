"""Model folders: written whole or not at all, opened or refused in a line."""

import errno
import json

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import retentive
from retentive.errors import InputError
from retentive.io.atomic import write_text
from retentive.models.checkpoint import fingerprint, load, save_model


def test_saved_and_loaded(model, tokens: Tensor, tmp_path) -> None:
    folder = tmp_path / "new" / "model"
    save_model(model, folder)
    assert sorted(x.name for x in folder.iterdir()) == ["config.json", "model.safetensors"]
    loaded = load(folder, dtype="float64")
    assert not loaded.training
    assert loaded.config == model.config
    assert torch.equal(loaded(tokens)[0], model(tokens)[0])
    assert fingerprint(loaded) == fingerprint(model)
    assert all(weight.requires_grad for weight in loaded.parameters())
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    fields = json.loads((folder / "config.json").read_text())
    assert fields["model_type"] == model.config.model_type


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_loaded_in_another_dtype(make_model, tokens: Tensor, tmp_path, name: str) -> None:
    model = make_model("retnet")
    save_model(model, tmp_path)
    loaded = load(tmp_path, dtype=name)
    assert {weight.dtype for weight in loaded.parameters()} == {getattr(torch, name)}
    decay = loaded.layers[0].retention.log_decay.value
    assert decay.dtype == torch.float64
    assert torch.equal(decay, model.layers[0].retention.log_decay.value)
    logits, _ = loaded(tokens)
    assert (logits.double() - model(tokens)[0]).norm() <= 0.05 * logits.double().norm()


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_is_left_out(make_model, tokens: Tensor, tmp_path, tied: bool) -> None:
    model = make_model("retnet", tie_word_embeddings=tied)
    save_model(model, tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied
    assert torch.equal(load(tmp_path, dtype="float64")(tokens)[0], model(tokens)[0])


def test_the_package_opens_folders(make_model, tmp_path) -> None:
    save_model(make_model("transformer"), tmp_path)
    assert isinstance(retentive.load(tmp_path), retentive.Transformer)


def test_any_step_of_training_changes_the_fingerprint(make_model, tokens: Tensor) -> None:
    model = make_model("retnet").float()
    seen = {fingerprint(model)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for _ in range(3):
        h, _ = model.hidden(tokens)
        model.loss(h, tokens).backward()
        optimizer.step()
        seen.add(fingerprint(model))
    assert len(seen) == 4


def refused(folder, *words: str, **options: str) -> None:
    with pytest.raises(InputError) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_refuses_bad_folders(make_model, tmp_path) -> None:
    folder = tmp_path / "model"
    refused(folder, "no model folder", str(folder))
    folder.mkdir()
    refused(folder, "holds no config.json")
    save_model(make_model("retnet"), folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    text, whole, tensors = config.read_text(), weights.read_bytes(), load_file(weights)
    fields = json.loads(text)

    for broken in (text[: len(text) // 2], "", "[]", '"retnet"'):
        config.write_text(broken)
        refused(folder, "config.json")
    for change, word in (
        ({"hiden_size": 3}, "'hidden_size'"),
        ({"num_heads": 3}, "num_heads 3"),
        ({"model_type": "llama"}, "'llama'"),
    ):
        config.write_text(json.dumps({**fields, **change}))
        refused(folder, "config.json", word)
    for change, word in (
        ({"vocab_size": 62}, "embed_tokens.weight"),
        ({"num_hidden_layers": 3}, "lacks"),
        ({"num_hidden_layers": 1}, "too many"),
        ({"tie_word_embeddings": True}, "lm_head.weight"),
    ):
        config.write_text(json.dumps({**fields, **change}))
        refused(folder, "model.safetensors", word)
    config.write_text(text)

    weights.unlink()
    refused(folder, "model.safetensors", "does not exist")
    for kept in (0, 7, 100, len(whole) - 1):
        weights.write_bytes(whole[:kept])
        refused(folder, "model.safetensors", "truncated")
    save_file({**tensors, "norm.bias": torch.zeros(1)}, weights)
    refused(folder, "norm.bias", "(1,)", "(32,)")

    weights.write_bytes(whole)
    refused(folder, "unknown dtype", "float32", dtype="flaot32")
    refused(folder, "unknown device", device="gpu")
    load(folder)


def test_a_failed_save_leaves_the_old_files(make_model, tmp_path, monkeypatch) -> None:
    save_model(make_model("retnet"), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match=r"model\.safetensors") as caught:
        save_model(make_model("retnet", num_heads=2), tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_text_is_written_whole(tmp_path) -> None:
    path = tmp_path / "file"
    write_text(path, "äß")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \ud800")
    assert path.read_text(encoding="utf-8") == "äß"
    assert [x.name for x in tmp_path.iterdir()] == ["file"]
