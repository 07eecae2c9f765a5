"""The decode runner and packed weights against the model's own calls."""

import gc
import weakref

import pytest
import torch

from retentive.errors import InputError
from retentive.inference.packed import PackedLinear, pack_
from retentive.inference.runner import (
    AHEAD,
    DecodeRunner,
    ModelRunner,
    fastest_threads,
    runner,
)
from retentive.models.checkpoint import save_model
from retentive.models.config import RetNetConfig, TransformerConfig
from retentive.models.files import fingerprint
from retentive.models.language_model import LanguageModel
from retentive.models.nested import AttentionConfig
from retentive.models.retnet import RetNet
from retentive.models.state import RetNetState
from retentive.models.transformer import Transformer

SIZES = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4}
CONFIGS = {
    "plain": RetNetConfig(**SIZES),
    "gated": RetNetConfig(
        **SIZES,
        gated_ffn=True,
        hidden_act="swish",
        row_scale=True,
        norm="rmsnorm",
        head_norm="rmsnorm",
        ffn_subln="rmsnorm",
        ffn_bias=True,
    ),
    "ablated": RetNetConfig(**SIZES, gate=False, head_norm="none", tie_word_embeddings=True),
    "post-norm": RetNetConfig(
        **SIZES,
        block="post-norm",
        residual_scale=2**0.5,
        final_norm=False,
        embed_scale=8.0,
        embed_norm=True,
        ffn_bias=True,
        ffn_subln="layernorm",
    ),
    "parallel": RetNetConfig(
        **SIZES,
        block="parallel",
        gate_act="gelu",
        head_norm_affine=True,
        rotary_dim=4,
        num_kv_heads=2,
        qkv_bias=True,
        out_bias=True,
        head_bias=True,
    ),
    "xpos": RetNetConfig(
        **SIZES,
        block="output-norm",
        rotation="rope-across-heads",
        xpos_base=32.0,
        gate_bias=True,
        tie_word_embeddings=True,
    ),
    "hybrid": RetNetConfig(
        **SIZES, attention_layers=(0,), attention=AttentionConfig(4, qkv_bias=True, window=8)
    ),
    "transformer": TransformerConfig(**SIZES, num_kv_heads=2, gated_ffn=True),
}
START = AHEAD - 3  # so that the steps cross the end of a table of angles


def build(name: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    config = CONFIGS[name]
    model = RetNet(config) if isinstance(config, RetNetConfig) else Transformer(config)
    model.init_weights(seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:  # biases and norms: it shows where they act
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return model.to(dtype).eval()


@pytest.fixture(params=CONFIGS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(61, (3, START + AHEAD), generator=torch.Generator().manual_seed(1))


def ragged_state(model: LanguageModel, tokens: torch.Tensor) -> RetNetState:
    """After START tokens of each row, the second row without its first two."""
    mask = torch.ones(3, START, dtype=torch.bool)
    mask[1, :2] = False
    with torch.no_grad():
        return model(tokens[:, :START], padding_mask=mask)[1]


def stepped(model: LanguageModel, tokens: torch.Tensor, state: RetNetState) -> torch.Tensor:
    """Logits `[B,T,vocab]`, a token at a time."""
    decoding = runner(model, state)
    return torch.stack([decoding.step(column) for column in tokens[:, START:].unbind(1)], 1)


def error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


@torch.no_grad()
def exact_logits(name: str, tokens: torch.Tensor) -> torch.Tensor:
    """Of the float64 model, all tokens in one call."""
    model = build(name, torch.float64)
    return model(tokens[:, START:], ragged_state(model, tokens))[0]


def test_steps_are_the_model(name, tokens):
    model = build(name, torch.float64)
    assert error(
        stepped(model, tokens, ragged_state(model, tokens)), exact_logits(name, tokens)
    ) < (1e-13)


@pytest.mark.parametrize("dtype, within", [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_packed_weights_are_as_exact_as_plain_ones(name, tokens, dtype, within):
    exact = exact_logits(name, tokens)
    plain, packed = build(name, dtype), pack_(build(name, dtype))
    before = error(stepped(plain, tokens, ragged_state(plain, tokens)), exact)
    after = error(stepped(packed, tokens, ragged_state(packed, tokens)), exact)
    assert after < within
    assert after < 1.5 * before


def test_packing_replaces_every_product(name):
    model = pack_(build(name))
    left = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert not left
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    assert pack_(model) is model  # once more changes nothing


def test_a_packed_model_reads_prompts_as_before(name, tokens):
    plain, packed = build(name), pack_(build(name))
    with torch.no_grad():
        (logits, state), (again, after) = plain(tokens), packed(tokens)
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-5)
    for layer, other in zip(state.layers, after.layers, strict=True):
        for key, tensor in layer.tensors().items():
            torch.testing.assert_close(other.tensors()[key], tensor, rtol=1e-4, atol=1e-5)


def test_dtypes_without_a_kernel_stay_as_they_are(tokens):
    model = pack_(build("plain", torch.float64))
    assert model.packed_from is None
    logits, _ = model(tokens)
    logits.sum().backward()  # it is a model like any other


@pytest.mark.parametrize("packed", [False, True])
def test_a_runner_is_freed_at_once(packed):
    """It holds a state and what the steps are made of, none of it in a cycle."""
    model = build("plain")
    decoding = runner(pack_(model) if packed else model, model.init_state(2))
    decoding.step(torch.tensor([1, 2]))
    gone = weakref.ref(decoding)
    gc.disable()
    try:
        del decoding
        assert gone() is None
    finally:
        gc.enable()


def test_the_state_given_is_not_changed(tokens):
    model = build("plain")
    state = ragged_state(model, tokens)
    before = [layer.S.clone() for layer in state.layers]
    decoding = runner(model, state)
    assert isinstance(decoding, DecodeRunner)
    decoding.step(tokens[:, START])
    assert all(torch.equal(a.S, b) for a, b in zip(state.layers, before, strict=True))
    assert state.positions.tolist() == [START, START - 2, START]
    assert decoding.state.positions.tolist() == [START + 1, START - 1, START + 1]


def test_the_runners_state_goes_on_in_the_model(tokens):
    model = build("gated", torch.float64)
    decoding = runner(model, ragged_state(model, tokens))
    decoding.step(tokens[:, START])
    with torch.no_grad():
        logits, _ = model(tokens[:, START + 1 :], decoding.state)
    torch.testing.assert_close(logits, exact_logits("gated", tokens)[:, 1:])


def test_far_positions_keep_their_angles(tokens):
    """At 10^6 a float32 angle would be off by 0.05; the steps must be right to float32."""
    model, exact = build("plain"), build("plain", torch.float64)
    far = RetNetState(torch.full((3,), 10**6), exact.init_state(3).layers)
    with torch.no_grad():
        expected, _ = exact(tokens, far)
    far = RetNetState(torch.full((3,), 10**6), model.init_state(3).layers)
    decoding = runner(model, far)
    logits = torch.stack([decoding.step(column) for column in tokens.unbind(1)], 1)
    assert error(logits, expected) < 2e-6


def test_only_a_retnet_has_a_runner_of_its_own():
    kinds = {"plain": DecodeRunner, "parallel": DecodeRunner, "xpos": DecodeRunner}
    kinds |= {"hybrid": ModelRunner, "transformer": ModelRunner}
    for name, kind in kinds.items():
        model = build(name)
        assert type(runner(model, model.init_state(1))) is kind


def test_a_packed_model_keeps_its_fingerprint_and_is_not_saved(name, tmp_path):
    model = build(name)
    before = fingerprint(model)
    assert fingerprint(pack_(model)) == before
    with pytest.raises(InputError, match="packed"):
        save_model(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_packing_is_for_the_cpu():
    with torch.device("meta"):
        model = RetNet(CONFIGS["plain"])
    with pytest.raises(InputError, match="only models on the CPU"):
        pack_(model)


def test_tokens_out_of_range_are_refused():
    model = build("plain")
    with pytest.raises(InputError, match="0 to 60"):
        runner(model, model.init_state(1)).step(torch.tensor([61]))


@pytest.mark.parametrize("name", ["plain", "gated", "ablated"])
def test_logits_do_not_depend_on_the_number_of_threads(name, tokens):
    """Else the measured choice of threads could change what is written."""
    model = pack_(build(name))
    state, threads = ragged_state(model, tokens), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = stepped(model, tokens, state)
        torch.set_num_threads(2)
        assert torch.equal(stepped(model, tokens, state), one)
    finally:
        torch.set_num_threads(threads)


def test_the_choice_of_threads_leaves_the_number_as_it_was():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert fastest_threads(build("plain"), rows=2) in (1, 2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
