"""A model and its adapter as one model; PEFT opens the same folder and finds the same."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from retentive.adapters.loading import load_adapted
from retentive.compress.quantize import quantize
from retentive.errors import InputError
from retentive.models.checkpoint import fingerprint, load, save_model
from retentive.models.language_model import LanguageModel
from retentive.models.retnet import RetNet


@torch.no_grad()
def test_lora_is_merged(
    base: Path, lora: Path, adapted: LanguageModel, model: LanguageModel, tokens: Tensor
) -> None:
    merged = load_adapted(base, lora)
    assert merged.state_dict().keys() == model.state_dict().keys()
    wanted = adapted(tokens)[0]
    assert (wanted - model(tokens)[0]).abs().max() > 0.1
    exact = adapted.double()(tokens)[0]
    rounding = (wanted - exact).abs().max()
    assert (merged(tokens)[0] - exact).abs().max() < 4 * rounding


@torch.no_grad()
def test_texts_begin_with_a_tuned_state(
    base: Path, state: Path, tuned: LanguageModel, model: LanguageModel, tokens: Tensor
) -> None:
    opened = load_adapted(base, state)
    wanted, _ = tuned(tokens)
    assert torch.equal(opened(tokens)[0], wanted)
    assert torch.allclose(opened(tokens, opened.init_state(2))[0], wanted, atol=1e-6)
    assert (wanted - model(tokens)[0]).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lora", "state"])
def test_in_another_dtype(base: Path, lora: Path, state: Path, tokens: Tensor, kind: str) -> None:
    """Adapted in float32, where the fingerprint is known, then rounded; the states are not."""
    adapter = lora if kind == "lora" else state
    opened = load_adapted(base, adapter, dtype="bfloat16")
    assert opened.dtype is torch.bfloat16
    for name, exact in load_adapted(base, adapter).state_dict().items():
        rounded = exact if name.endswith("initial_state") else exact.bfloat16()
        assert torch.equal(opened.state_dict()[name], rounded)
    logits, after = opened(tokens)
    assert logits.isfinite().all() and after.layers[0]["S"].dtype is torch.float32


@pytest.mark.filterwarnings(  # PEFT asks the newest transformers by an old name
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
@torch.no_grad()
def test_peft_opens_the_folder(
    base: Path, lora: Path, adapted: LanguageModel, tokens: Tensor, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import retentive.hf  # noqa: F401

    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora)
    wanted = adapted(tokens)[0]
    assert torch.equal(opened(tokens).logits, wanted)
    opened.save_pretrained(tmp_path / "peft")
    again = load_adapted(base, tmp_path / "peft")  # PEFT knows of no fingerprint
    assert torch.equal(again(tokens)[0], load_adapted(base, lora)(tokens)[0])
    fields = json.loads((lora / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(base)


def test_a_session_of_an_adapted_model_is_its_own(base: Path, lora: Path, state: Path) -> None:
    """The fingerprint that ties saved texts to their model tells these apart."""
    marks = {fingerprint(load_adapted(base, adapter)) for adapter in (lora, state)}
    assert len(marks | {fingerprint(load(base))}) == 3
    assert fingerprint(load_adapted(base, lora)) in marks


def changed(base: Path, folder: Path, **config: int) -> Path:
    """A model of other weights."""
    model = RetNet(type(load(base).config).from_dict(load(base).config.to_dict() | config))
    model.init_weights(seed=9)
    save_model(model, folder)
    return folder


@pytest.mark.parametrize("kind", ["lora", "state"])
def test_another_models_adapter_is_refused(
    base: Path, lora: Path, state: Path, tmp_path: Path, kind: str
) -> None:
    adapter = lora if kind == "lora" else state
    with pytest.raises(InputError, match=r"was trained on another model, or on other weights"):
        load_adapted(changed(base, tmp_path / "other"), adapter)


def test_shapes_tell_where_there_is_no_fingerprint(base: Path, lora: Path, tmp_path: Path) -> None:
    tensors = load_file(lora / "adapter_model.safetensors")
    save_file(tensors, lora / "adapter_model.safetensors", {"format": "pt"})
    line = r"another model's: layers\.0\.ffn\.down_proj\.lora_A\.weight is \[4, 32\], where this .*"
    with pytest.raises(InputError, match=line):
        load_adapted(changed(base, tmp_path / "wide", intermediate_size=48), lora)
    with pytest.raises(InputError, match=r"layers\.1\.\S+ is \[.*\], where this one has missing"):
        load_adapted(changed(base, tmp_path / "flat", num_hidden_layers=1), lora)


@pytest.mark.parametrize("kind", ["lora", "state"])
def test_a_quantised_model_is_refused(
    base: Path, lora: Path, state: Path, tmp_path: Path, kind: str
) -> None:
    save_model(quantize(load(base), 8), tmp_path / "small")
    with pytest.raises(InputError, match=r"are quantised; give the model it was made from"):
        load_adapted(tmp_path / "small", lora if kind == "lora" else state)


def test_what_is_no_adapter(base: Path, lora: Path, state: Path, tmp_path: Path) -> None:
    for folder, line in [
        (tmp_path / "nowhere", "there is no adapter folder"),
        (base, "is a model, no adapter; give it in the place of the model"),
        (tmp_path, r"holds neither adapter_config\.json \(of LoRA\) nor initial_state"),
    ]:
        with pytest.raises(InputError, match=line):
            load_adapted(base, folder)
    shutil.copy(state / "initial_state.safetensors", lora)
    with pytest.raises(InputError, match="keep one adapter in a folder"):
        load_adapted(base, lora)


def test_broken_adapters(base: Path, lora: Path, state: Path) -> None:
    whole = (lora / "adapter_model.safetensors").read_bytes()
    (lora / "adapter_model.safetensors").write_bytes(whole[:100])
    with pytest.raises(InputError, match=r"adapter file .* is truncated"):
        load_adapted(base, lora)
    (lora / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter file .* does not exist"):
        load_adapted(base, lora)
    (lora / "adapter_model.safetensors").write_bytes(whole)
    (state / "initial_state.safetensors").write_bytes(whole)
    with pytest.raises(InputError, match="holds no tuned state"):
        load_adapted(base, state)
    for text, line in [
        ("{", r"adapter_config\.json is truncated or no JSON"),
        ('{"peft_type": "PREFIX_TUNING"}', r"of type 'PREFIX_TUNING'; this package merges LORA"),
        ('{"peft_type": "LORA", "target_modules": ["qkv"]}', r"does not fit the model: .*'qkv'"),
    ]:
        (lora / "adapter_config.json").write_text(text)
        with pytest.raises(InputError, match=line) as caught:
            load_adapted(base, lora)
        assert "\n" not in str(caught.value)


def test_without_peft(base: Path, lora: Path, state: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r'LoRA takes PEFT: pip install "retentive\[hf\]"'):
        load_adapted(base, lora)
    assert load_adapted(base, state)


def test_a_tuned_state_is_not_saved_as_weights(tuned: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no part of a model folder"):
        save_model(tuned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_folder_says_of_its_model(base: Path, lora: Path, state: Path) -> None:
    for file in (lora / "adapter_model.safetensors", state / "initial_state.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["fingerprint"] == fingerprint(load(base))
