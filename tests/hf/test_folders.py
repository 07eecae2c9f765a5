"""Our folders are transformers' folders: either opens what the other wrote, bit by bit."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

import retentive
import retentive.hf as hf
from retentive.compress.quantize import quantize
from retentive.data.tokenizer import END, load_tokenizer, save_tokenizer
from retentive.errors import InputError
from retentive.layers.rotation import Constant
from retentive.models.checkpoint import load, load_config, save_model
from retentive.models.config import BOOKKEEPING
from retentive.models.retnet import RetNet


def same_weights(first, second) -> bool:
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_our_folder_opens_in_transformers(folder, tokens) -> None:
    ours, theirs = load(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert same_weights(theirs, ours)
    assert theirs.config.as_native() == ours.config
    assert not theirs.training and not theirs.retentive.training
    assert torch.equal(theirs(tokens).logits, ours(tokens)[0])


def test_their_folder_opens_here(folder, tokens, tmp_path) -> None:
    theirs, saved = AutoModelForCausalLM.from_pretrained(folder), tmp_path / "saved"
    theirs.save_pretrained(saved)
    ours = load(saved)
    assert ours.config == load_config(folder)
    assert same_weights(ours, theirs)
    assert torch.equal(ours(tokens)[0], theirs(tokens).logits)
    with safe_open(folder / "model.safetensors", "pt") as before:
        with safe_open(saved / "model.safetensors", "pt") as after:
            assert set(before.keys()) == set(after.keys())  # a tied head is in neither
            assert after.metadata()["format"] == "pt"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_in_another_dtype(folder, tokens, tmp_path, dtype) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    ours = load(folder, dtype=str(dtype).removeprefix("torch."))
    assert {weight.dtype for weight in theirs.parameters()} == {dtype}
    assert all(
        constant.value.dtype == torch.float64
        for constant in theirs.modules()
        if isinstance(constant, Constant)
    )
    assert torch.equal(theirs(tokens).logits, ours(tokens)[0])
    theirs.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] in str(dtype)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").dtype == dtype


def test_shards_open_on_both_sides(make_folder, tokens, tmp_path) -> None:
    theirs, saved = AutoModelForCausalLM.from_pretrained(make_folder("retnet")), tmp_path / "saved"
    theirs.save_pretrained(saved, max_shard_size="20KB")
    assert len(list(saved.glob("model-*-of-*.safetensors"))) > 2
    assert same_weights(AutoModelForCausalLM.from_pretrained(saved), theirs)
    assert same_weights(retentive.load(saved), theirs)


def test_a_new_model_is_initialised_as_ours(tmp_path) -> None:
    config = hf.RetentiveConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_heads=4)
    torch.manual_seed(3)
    theirs = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(3)
    assert same_weights(theirs, RetNet(config.as_native()))
    assert AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_weights_that_a_folder_lacks_are_initialised(make_folder, tmp_path) -> None:
    folder = make_folder("retnet")
    file = folder / "model.safetensors"
    kept = load_file(file)
    lost = {"layers.0.retention.g_proj.weight", "layers.1.ffn_norm.weight", "lm_head.weight"}
    save_file({k: v for k, v in kept.items() if k not in lost}, file, {"format": "pt"})
    torch.manual_seed(0)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert set(info["missing_keys"]) == lost
    for name, weight in model.state_dict().items():
        if name in lost:
            assert 0.5 < weight.std() / kept[name].std() < 2 or bool((weight == 1).all())
        else:
            assert torch.equal(weight, kept[name])


def test_configs(folder) -> None:
    fields = json.loads((folder / "config.json").read_text())
    config = AutoConfig.from_pretrained(folder)
    assert config.as_native() == load_config(folder)
    assert config.num_attention_heads == 4  # what other tools ask for
    assert AutoConfig.from_pretrained(folder, dropout=0.5).as_native().dropout == 0.5
    for change, word in (
        ({"hiden_size": 3}, "'hidden_size'"),
        ({"num_heads": 3}, "num_heads 3"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
    ):
        with pytest.raises(InputError, match=word):
            type(config)(**{**fields, **change})


def test_what_a_call_says_of_the_config(make_folder) -> None:
    folder = make_folder("retnet")
    opened = AutoModelForCausalLM.from_pretrained(folder, eos_token_id=3, use_cache=False)
    assert (opened.config.eos_token_id, opened.config.use_cache) == (3, False)
    assert opened.generation_config.eos_token_id == 3
    plain = AutoConfig.from_pretrained(folder)
    assert (plain.use_cache, plain.eos_token_id, plain.pad_token_id) == (True, None, None)
    assert not {"use_cache", "bos_token_id"} & plain.to_diff_dict().keys()


def test_their_own_keys_open_again(make_folder, tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_folder("retnet"))
    model.config.update({"num_labels": 3, "chunk_size_feed_forward": 1, "use_cache": False})
    model.config.problem_type = "single_label_classification"
    model.save_pretrained(tmp_path)
    for use_diff in (True, False):
        model.config.to_json_file(tmp_path / "config.json", use_diff=use_diff)
        assert load(tmp_path).config == model.config.as_native()
        config = AutoModelForCausalLM.from_pretrained(tmp_path).config
        assert (config.num_labels, config.use_cache) == (3, False)
    assert {field.name for field in dataclasses.fields(PreTrainedConfig)} <= BOOKKEEPING


def test_a_key_of_nobodys_is_refused_before_anything_is_written(make_folder) -> None:
    folder = make_folder("retnet")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.my_note = "x"
    with pytest.raises(InputError, match=r"config\.my_note .* del config\.my_note"):
        model.save_pretrained(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert "my_note" in repr(model.config)
    del model.config.my_note
    model.save_pretrained(folder)


def test_quantised_folders_are_refused(make_folder, tmp_path) -> None:
    folder = make_folder("retnet")
    save_model(quantize(load(folder), bits=8), tmp_path / "int8")
    shutil.copy(folder / "tokenizer.json", tmp_path / "int8")
    with pytest.raises(InputError, match=r"quantised.*retentive\.load"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    assert AutoTokenizer.from_pretrained(tmp_path / "int8").eos_token == END


def test_placed_whole_or_refused(make_folder, tokens, tmp_path) -> None:
    folder = make_folder("retnet")
    expected = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    for placed in ("cpu", "auto", {"": "cpu"}):
        model = AutoModelForCausalLM.from_pretrained(folder, device_map=placed)
        assert torch.equal(model(tokens).logits.cpu(), expected)
    little = {"max_memory": {"cpu": 60_000}, "offload_folder": tmp_path / "offload"}
    with pytest.raises(InputError, match="whole on one"):
        AutoModelForCausalLM.from_pretrained(folder, device_map="auto", **little)


def test_the_end_of_a_text_ends_generation(make_folder, tmp_path) -> None:
    folder = make_folder("retnet")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == 0
    model.save_pretrained(tmp_path / "saved")
    assert GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id == 0
    model.generation_config.eos_token_id = [5, 6]  # what a folder says is kept
    model.generation_config.save_pretrained(folder)
    kept = AutoModelForCausalLM.from_pretrained(folder).generation_config
    assert kept.eos_token_id == [5, 6]
    GenerationConfig(pad_token_id=7).save_pretrained(folder)
    kept = AutoModelForCausalLM.from_pretrained(folder).generation_config
    assert (kept.eos_token_id, kept.pad_token_id) == (0, 7)
    (folder / "tokenizer.json").unlink()
    (folder / "generation_config.json").unlink()
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id is None


def test_weights_given_instead_of_a_folder_need_no_name(make_folder, monkeypatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_folder("retnet"))
    monkeypatch.setattr("retentive.hf.model.end_of_text", None)  # a call would fail
    weights = {"config": model.config, "state_dict": model.state_dict()}
    assert same_weights(hf.RetentiveForCausalLM.from_pretrained(None, **weights), model)


def test_tokenizers(make_folder, tmp_path) -> None:
    folder, text = make_folder("retnet"), "def f(x):\n    return 'ü'"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer) is PreTrainedTokenizerFast
    tokenizer.save_pretrained(tmp_path / "saved")
    shutil.copy(folder / "config.json", tmp_path / "saved")
    for opened in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert opened.eos_token == opened.pad_token == opened.bos_token == END
        assert opened.padding_side == "left"
        ids = load_tokenizer(folder).encode(text).ids
        assert opened(text).input_ids == [0, *ids]  # as a text begins in training
        assert opened(text, add_special_tokens=False).input_ids == ids
        assert opened.decode([0, *ids, 0], skip_special_tokens=True) == text
    assert load_tokenizer(tmp_path / "saved").encode(text, add_special_tokens=False).ids == ids
    assert AutoTokenizer.from_pretrained(folder, eos_token="a").eos_token == "a"


def test_what_is_said_of_a_tokenizer_is_kept(make_folder) -> None:
    folder = make_folder("retnet")
    said = {"model_max_length": 16, "truncation_side": "left", "chat_template": "{{messages}}"}
    said |= {"padding_side": "right", "bos_token": "a", "pad_token": "b", "unk_token": "c"}
    kept = {**said, "eos_token": END}
    opened = AutoTokenizer.from_pretrained(folder, extra_special_tokens=["<x>"], **said)
    assert {key: getattr(opened, key) for key in kept} == kept
    assert "<x>" in opened.all_special_tokens
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(said))
    opened = AutoTokenizer.from_pretrained(folder)
    assert {key: getattr(opened, key) for key in kept} == kept
    assert opened("b").tokens() == ["a", "b"]
    assert AutoTokenizer.from_pretrained(folder, add_bos_token=False)("b").tokens() == ["b"]
    settings.write_text(json.dumps(said | {"add_bos_token": False}))
    assert AutoTokenizer.from_pretrained(folder)("b").tokens() == ["b"]
    assert AutoTokenizer.from_pretrained(folder, add_bos_token=True)("b").tokens() == ["a", "b"]


def test_tokenizers_of_others(make_folder) -> None:
    folder = make_folder("retnet")
    other = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    save_tokenizer(other, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("</s>", None)
    assert tokenizer("a").input_ids == [2]
    save_tokenizer(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), folder)
    assert AutoTokenizer.from_pretrained(folder).eos_token is None


def test_the_card_says_how_to_open_the_folder(make_folder, tmp_path) -> None:
    model, saved = AutoModelForCausalLM.from_pretrained(make_folder("retnet")), tmp_path / "saved"
    model.save_pretrained(saved)
    card = (saved / "README.md").read_text()
    promise = "If flash-linear-attention has models of this kind, `retentive convert --to fla`"
    for words in ("import retentive.hf", "retentive[hf]", '"saved"', promise):
        assert words in card
    (saved / "README.md").write_text("mine")
    model.save_pretrained(saved)
    assert (saved / "README.md").read_text() == "mine"


def test_transformers_is_asked_for_in_a_line() -> None:
    code = "import sys; sys.modules['transformers'] = None; import retentive.hf"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'pip install "retentive[hf]"' in result.stderr.splitlines()[-1]
