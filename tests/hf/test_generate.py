"""`generate` does what the model does token by token, and what `retentive.generate` does."""

import copy
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    TextIteratorStreamer,
    pipeline,
)

import retentive
import retentive.hf as hf
from retentive.data.tokenizer import END, load_tokenizer, save_tokenizer
from retentive.errors import InputError
from retentive.hf.cache import CACHE
from retentive.models.checkpoint import load
from retentive.models.language_model import LanguageModel

GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(autouse=True)
def every_row_goes_on(theirs: hf.RetentiveForCausalLM) -> None:
    """Untrained models end a text at any time; most tests here want them not to."""
    theirs.generation_config.eos_token_id = None


@pytest.fixture
def words(folder: Path) -> Path:
    """The folder with a tokenizer of words: single bytes are seldom text."""
    tokenizer = Tokenizer(models.WordLevel({END: 0} | {f"w{i}": i for i in range(1, 257)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([END])
    save_tokenizer(tokenizer, folder)
    return folder


@torch.no_grad()
def token_by_token(model: LanguageModel, row: Tensor, count: int) -> Tensor:
    """The oracle: greedy, from a prompt `[T]`; the new tokens `[count]`."""
    tokens = row
    for _ in range(count):
        logits, _ = model(tokens[None])
        tokens = torch.cat([tokens, logits[0, -1:].argmax(-1)])
    return tokens[len(row) :]


def test_greedy_is_token_by_token(ours, theirs, tokens) -> None:
    made = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **GREEDY)
    for row, whole in zip(tokens, made, strict=True):
        assert torch.equal(whole, torch.cat([row, token_by_token(ours, row, 8)]))
    assert torch.equal(theirs.generate(tokens[:1], use_cache=False, **GREEDY), made[:1])
    embeds = theirs.get_input_embeddings()(tokens)
    assert torch.equal(theirs.generate(inputs_embeds=embeds, **GREEDY), made[:, -8:])


def test_rows_of_a_padded_batch_are_as_they_are_alone(ours, theirs, folder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = ["def f(x):", "import os, sys", "#"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    made = theirs.generate(**batch, **GREEDY)[:, -8:]
    chunked = theirs.generate(**batch, **GREEDY, prefill_chunk_size=4)[:, -8:]
    for prompt, new, again in zip(prompts, made, chunked, strict=True):
        alone = tokenizer(prompt, return_tensors="pt").input_ids[0]
        assert torch.equal(new, token_by_token(ours, alone, 8))
        assert torch.equal(new, again)


def test_it_is_what_retentive_generate_does(ours, theirs, words) -> None:
    theirs.generation_config.eos_token_id = 0
    tokenizer, prompts = AutoTokenizer.from_pretrained(words), ["w3 w200", "w7 w8 w9 w10"]
    expected = retentive.generate(
        ours, load_tokenizer(words), prompts, max_new_tokens=20, temperature=0
    )
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    made = theirs.generate(**batch, max_new_tokens=20, do_sample=False)
    new = tokenizer.batch_decode(made[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    assert new == [text.strip() for text in expected]
    assert all(new)


def test_beams_and_samples(theirs, tokens) -> None:
    """They carry states from step to step as greedy search does, in the order of the beams."""
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    prompt = {"input_ids": tokens, "attention_mask": mask, "max_new_tokens": 6}
    for search in (
        {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
        {"num_beams": 3, "do_sample": True},
        {"num_return_sequences": 3, "do_sample": True, "top_k": 20, "temperature": 0.7},
    ):
        made = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            made.append(theirs.generate(**prompt, **search, use_cache=use_cache))
        assert made[0].shape == (3 * search.get("num_return_sequences", 1), 18)
        assert torch.equal(*made)


def test_streamers(theirs, tokens, folder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    made = theirs.generate(tokens[:1], streamer=streamer, **GREEDY)
    assert "".join(streamer) == tokenizer.decode(made[0, 12:])


def test_stop_strings(theirs, tokens, folder) -> None:
    tokenizer, given = AutoTokenizer.from_pretrained(folder), {"max_new_tokens": 40}
    given["repetition_penalty"] = 1.5  # else one that is no letter may go on and on
    whole = theirs.generate(tokens[:1], **given)[0, 12:]
    letters = [tokenizer.decode(token) for token in whole]
    end = next(i for i, letter in enumerate(letters) if i > 3 and letter.isalpha())
    given |= {"stop_strings": letters[end], "tokenizer": tokenizer}
    made = theirs.generate(tokens[:1], **given)[0, 12:]
    assert torch.equal(made, whole[: letters.index(letters[end]) + 1])


def test_chunks_of_a_prompt_that_are_pads_for_every_row(theirs, tokens) -> None:
    mask = torch.ones_like(tokens)
    mask[:, :9] = 0
    mask[0, 9] = 0
    prompt = {"attention_mask": mask, "return_dict_in_generate": True, **GREEDY}
    expected = theirs.generate(tokens, **prompt)
    for more in ({}, {"output_hidden_states": True}, {"prompt_lookup_num_tokens": 2}):
        rows = slice(1, 2) if "prompt_lookup_num_tokens" in more else slice(None)
        given = prompt | more | {"attention_mask": mask[rows], "prefill_chunk_size": 4}
        made = theirs.generate(tokens[rows], **given)
        assert torch.equal(made.sequences, expected.sequences[rows])
    cache = hf.RetentiveCache()
    skipped = theirs(tokens[:, :4], mask[:, :4], cache, output_hidden_states=True)
    assert skipped.logits.shape == (3, 4, 257) and not skipped.logits.any()
    assert [state.shape for state in skipped.hidden_states] == [(3, 4, 32)] * 3
    assert cache.get_seq_length() == 4
    rest = theirs(tokens[:, 4:], mask, cache).logits
    assert (rest - theirs(tokens, mask).logits[:, 4:]).abs().max() < 1e-12


def test_turns(theirs, tokens) -> None:
    """A second turn goes on from the cache of the first, which may be a copy."""
    ones = torch.ones_like(tokens)
    mask = ones.clone()
    mask[1, :5] = 0
    first = theirs.generate(
        tokens, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **GREEDY
    )
    cache = first[CACHE]
    assert isinstance(cache, hf.RetentiveCache)
    assert cache.get_seq_length() == first.sequences.shape[1] - 1
    whole = torch.cat([first.sequences, tokens[:, :4]], 1)
    longer = torch.cat([mask, ones, ones], 1)[:, : whole.shape[1]]
    expected = theirs.generate(whole, attention_mask=longer, **GREEDY)
    for given in (copy.copy(cache), copy.deepcopy(cache), cache):
        made = theirs.generate(whole, attention_mask=longer, past_key_values=given, **GREEDY)
        assert torch.equal(made, expected)
    own = hf.RetentiveCache()
    theirs.generate(tokens, attention_mask=mask, past_key_values=own, **GREEDY)
    made = theirs.generate(whole, attention_mask=longer, past_key_values=own, **GREEDY)
    assert torch.equal(made, expected)


def test_a_row_that_ended_early_cannot_go_on_from_the_cache(theirs, tokens) -> None:
    ends = int(theirs(tokens).logits[1, -1].argmax())
    ended = {"eos_token_id": ends, "pad_token_id": 0, "return_dict_in_generate": True}
    ones = torch.ones_like(tokens)
    first = theirs.generate(tokens, attention_mask=ones, **ended, **GREEDY)
    mask = torch.ones(3, 21)
    mask[:, 12:-1] = (first.sequences[:, 12:] != 0).int()
    assert not mask[1, 13:-1].any() and mask[0].all()
    whole = torch.cat([first.sequences, tokens[:, :1]], 1)
    with pytest.raises(InputError, match="begin again without a cache"):
        theirs.generate(whole, attention_mask=mask, past_key_values=first[CACHE], **GREEDY)
    assert theirs.generate(whole, attention_mask=mask, **GREEDY).shape == (3, 29)


@pytest.mark.parametrize("padded", [False, True])
def test_assisted_decoding_is_exact(ours, theirs, tokens, padded) -> None:
    """Tokens tried in vain leave no trace in the states: of the model, nor of one that assists."""
    prompt = torch.cat([tokens[:1], tokens[:1, :6], tokens[:1, :3]], 1)  # repeats itself
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0 if padded else 1
    given = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False}
    expected = token_by_token(ours, prompt[mask.bool()], 24)
    assistant = copy.deepcopy(theirs)
    with torch.no_grad():  # often right and often wrong
        assistant.layers[1].ffn.down_proj.weight.mul_(0.6)
    assistant.generation_config.assistant_confidence_threshold = 0
    crops = []
    for helped in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": assistant}):
        cache = hf.RetentiveCache()
        crop = cache.crop
        cache.crop = lambda n, crop=crop: (crops.append(n), crop(n))
        made = theirs.generate(prompt, past_key_values=cache, **given, **helped)
        assert torch.equal(made[0, prompt.shape[1] :], expected)
        assert cache.seen == made.shape[1] - 1
    assert any(n < 0 for n in crops)


def test_it_assists_a_model_that_counts_positions(make_folder, tokens) -> None:
    assistant = hf.RetentiveForCausalLM.from_pretrained(make_folder("retnet"))
    sizes = {"num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=257, hidden_size=32, eos_token_id=None, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    llama = LlamaForCausalLM(config).eval()
    given = {"attention_mask": torch.ones_like(tokens[:1]), **GREEDY}
    expected = llama.generate(tokens[:1], **given)
    assert torch.equal(llama.generate(tokens[:1], assistant_model=assistant, **given), expected)


def test_a_cache_that_records_goes_back_and_branches(theirs, tokens) -> None:
    mask = torch.ones(3, 12)
    mask[0, :2] = mask[1, 4] = mask[2, 7] = 0
    expected = theirs(tokens, mask).logits
    cache = hf.RetentiveCache()
    cache.activate_past_recording()
    theirs(tokens[:, :6], mask[:, :6], cache)
    branch = copy.copy(cache)
    theirs(tokens[:, 6:10], mask[:, :10], cache, logits_to_keep=3)
    for given, back in ((branch, 1), (cache, 3)):
        for _ in range(back):
            given.crop(-1)
        seen = given.get_seq_length()
        rest = theirs(tokens[:, seen:], mask, given).logits
        assert (rest - expected[:, seen:]).abs().max() < 1e-12
    with pytest.raises(InputError, match="cannot go back to 6 of 12"):
        cache.crop(-6)


def test_pipeline(theirs, words) -> None:
    theirs.float().save_pretrained(words)
    texts = ["w3 w200", "w7 w8 w9 w10"]
    make = pipeline("text-generation", model=str(words))
    made = make(texts, max_new_tokens=8, do_sample=False, batch_size=2, return_full_text=False)
    options = {"max_new_tokens": 8, "temperature": 0}
    expected = retentive.generate(load(words), load_tokenizer(words), texts, **options)
    assert [row[0]["generated_text"].strip() for row in made] == [t.strip() for t in expected]


def test_without_a_prompt_a_document_begins(theirs) -> None:
    end = theirs.generation_config.eos_token_id = theirs.generation_config.pad_token_id = 256
    made = theirs.generate(max_new_tokens=4, do_sample=False)
    assert torch.equal(
        made, theirs.generate(torch.tensor([[end]]), max_new_tokens=4, do_sample=False)
    )
    theirs.generation_config.eos_token_id = None
    with pytest.raises(InputError, match="no prompt and no end token"):
        theirs.generate(max_new_tokens=4)


def test_token_types_are_passed_over(theirs, tokens) -> None:
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    expected = theirs.generate(**given, **GREEDY)
    types = {"token_type_ids": torch.zeros_like(tokens)}
    assert torch.equal(theirs.generate(**given, **types, **GREEDY), expected)
