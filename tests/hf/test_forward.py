"""A call of the model: logits, padding, caches, losses, gradients."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

import retentive.hf as hf
from retentive.errors import InputError
from retentive.hf.cache import CACHE

EXACT = 1e-12  # of numbers of order 1 in float64


def close(given: Tensor, expected: Tensor) -> bool:
    return given.shape == expected.shape and (given - expected).abs().max().item() <= EXACT


@pytest.fixture
def mask(tokens: Tensor) -> Tensor:
    """Pads before, behind, and within a row."""
    mask = torch.ones_like(tokens)
    mask[0, :4] = mask[1, 8:] = 0
    mask[2, [0, 3, 4, 11]] = 0
    return mask


def test_the_models_own_logits(ours, theirs, tokens) -> None:
    expected, _ = ours(tokens)
    assert torch.equal(theirs(tokens).logits, expected)
    assert torch.equal(theirs(tokens, return_dict=False)[0], expected)
    assert close(theirs(tokens, logits_to_keep=3).logits, expected[:, -3:])
    assert close(theirs(tokens, logits_to_keep=torch.tensor([2, 5])).logits, expected[:, [2, 5]])


def test_a_row_is_as_it_is_alone_wherever_its_pads_are(theirs, tokens, mask) -> None:
    together = theirs(tokens, mask)
    more = theirs(tokens[:, :5], F.pad(mask, (0, 5), value=1), together.get(CACHE))
    for row in range(3):
        real = mask[row].bool()
        alone = theirs(torch.cat([tokens[row, real], tokens[row, :5]])[None]).logits[0]
        assert close(together.logits[row, real], alone[:-5])
        assert not together.logits[row, ~real].any()
        assert close(more.logits[row], alone[-5:])


def test_a_text_in_pieces(theirs, tokens) -> None:
    expected = theirs(tokens).logits
    first = theirs(tokens[:, :5])
    branch = copy.copy(first.get(CACHE))
    rest = theirs(tokens[:, 5:], past_key_values=first.get(CACHE))
    assert close(torch.cat([first.logits, rest.logits], 1), expected)
    assert rest.get(CACHE).get_seq_length() == 12
    assert close(theirs(tokens[:, 5:], past_key_values=branch).logits, rest.logits)
    assert theirs(tokens, use_cache=False).get(CACHE) is None


def test_embeddings_instead_of_tokens(theirs, tokens, mask) -> None:
    embeds = theirs.get_input_embeddings()(tokens)
    given = theirs(inputs_embeds=embeds, attention_mask=mask).logits
    assert torch.equal(given, theirs(tokens, mask).logits)


def test_hidden_states(ours, theirs, tokens, mask) -> None:
    states = theirs(tokens, mask, output_hidden_states=True).hidden_states
    assert len(states) == 3
    assert torch.equal(theirs.retentive.head(states[-1]), theirs(tokens, mask).logits)
    assert torch.equal(states[0][mask.bool()], ours.embed(tokens)[mask.bool()])
    assert theirs(tokens).hidden_states is None


def test_what_the_config_says_of_a_call(make_folder, tokens) -> None:
    folder = make_folder("retnet")
    model = AutoModelForCausalLM.from_pretrained(folder, use_cache=False, output_hidden_states=True)
    assert model(tokens).get(CACHE) is None and len(model(tokens).hidden_states) == 3
    asked = model(tokens, use_cache=True, output_hidden_states=False)
    assert asked.get(CACHE).seen == 12 and asked.hidden_states is None
    model.config.use_cache = True
    assert model(tokens).get(CACHE) is not None
    model.config.output_attentions = True
    refused("output_attentions", model, tokens)


@pytest.mark.parametrize("padded", [False, True])
def test_labels(theirs, tokens, mask, padded) -> None:
    """As by all logits: each real token's loss at the real token before it."""
    theirs.train()
    mask = mask if padded else torch.ones_like(mask)
    labels = tokens.masked_fill(mask == 0, -100)
    labels[2, 6] = -100  # a token of a prompt
    losses = []
    for row in range(3):
        real = mask[row].bool()
        logits = theirs(tokens[row : row + 1, real]).logits[0, :-1]
        losses.append(F.cross_entropy(logits, labels[row, real][1:], reduction="none"))
    losses = torch.cat(losses)
    losses = losses[losses != 0]
    gradients = [torch.autograd.grad(losses.mean(), theirs.parameters())]
    given = theirs(tokens, mask, labels=labels)
    gradients.append(torch.autograd.grad(given.loss, theirs.parameters()))
    assert given.logits is None and given.get(CACHE) is None
    assert close(given.loss, losses.mean())
    assert all(map(close, *gradients))
    counted = theirs(tokens, mask, labels=labels, num_items_in_batch=torch.tensor(7))
    assert close(counted.loss, losses.sum() / 7)


def test_logits_beside_a_loss(theirs, tokens) -> None:
    """Evaluation has both; training has logits only if asked."""
    expected = theirs(tokens).logits
    assert torch.equal(theirs(tokens, labels=tokens).logits, expected)
    theirs.train()
    assert theirs(tokens, labels=tokens).logits is None
    assert torch.equal(theirs(tokens, labels=tokens, logits_to_keep=0).logits, expected)


@pytest.mark.filterwarnings(  # the newest transformers has other names, 5.17 has these only
    "ignore:`(is_)?gradient_checkpointing:FutureWarning"
)
def test_gradient_checkpointing(theirs, tokens) -> None:
    theirs.train()
    plain = torch.autograd.grad(theirs(tokens, labels=tokens).loss, theirs.parameters())
    theirs.gradient_checkpointing_enable()
    assert theirs.is_gradient_checkpointing and theirs.retentive.checkpoint_layers
    counted = []
    theirs.layers[0].register_forward_pre_hook(lambda *_: counted.append(1))
    saved = torch.autograd.grad(theirs(tokens, labels=tokens).loss, theirs.parameters())
    assert len(counted) == 2  # once forward, once again backward
    assert all(map(close, saved, plain))
    theirs.gradient_checkpointing_disable()
    assert not theirs.retentive.checkpoint_layers


def test_a_larger_vocabulary(make_folder, theirs, tokens, tmp_path) -> None:
    expected = theirs(tokens).logits
    theirs.resize_token_embeddings(300, mean_resizing=False)
    assert close(theirs(tokens).logits[..., :257], expected)
    theirs(torch.tensor([[299]]), labels=torch.tensor([[299]]))
    theirs.save_pretrained(tmp_path / "larger")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "larger")
    assert opened.config.vocab_size == opened.retentive.config.vocab_size == 300
    assert torch.equal(opened.double()(tokens).logits, theirs(tokens).logits)


def test_it_is_one_model_with_the_librarys(theirs, tokens) -> None:
    assert list(theirs.state_dict()) == list(theirs.retentive.state_dict())
    twin = copy.deepcopy(theirs)
    twin.norm = torch.nn.LayerNorm(32, dtype=torch.float64)
    torch.nn.init.zeros_(twin.norm.weight)
    assert not twin(tokens).logits.any()
    assert theirs(tokens).logits.any()


def refused(words: str, call, *args, **kwargs) -> None:
    with pytest.raises(InputError, match=words) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_mistakes(make_folder, tokens, mask) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_folder("retnet"))
    refused("input_ids or inputs_embeds", model)
    refused("input_ids or inputs_embeds", model, tokens, inputs_embeds=torch.zeros(3, 12, 32))
    refused(r"attention_mask is \[3, 5\]; give \[3, 12\]", model, tokens, mask[:, :5])
    refused("marks no token", model, tokens, torch.zeros_like(mask))
    refused("DynamicCache.*RetentiveCache", model, tokens, past_key_values=DynamicCache())
    refused("output_attentions", model, tokens, output_attentions=True)
    refused("documents packed by them", model, tokens, position_ids=torch.zeros_like(tokens))
    refused("labels are", model, tokens, labels=tokens[:, 1:])
    read = model(tokens, mask).get(CACHE)
    refused(r"give \[3, 13\]", model, tokens[:, :1], mask[:, :1], read)
    refused("begin again", model, tokens[:, :1], torch.ones(3, 13), read)
    whole = model(tokens).get(CACHE)
    refused("begin again", model, tokens[:, :1], F.pad(mask, (0, 1), value=1), whole)
    refused("forgets nothing", whole.crop, -1)
    assert repr(whole) == "RetentiveCache(12 tokens)"
    fresh = hf.RetentiveCache()
    model(tokens, past_key_values=fresh)
    fresh.reset()
    assert torch.equal(model(tokens, past_key_values=fresh).logits, model(tokens).logits)
