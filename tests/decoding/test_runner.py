"""The runners in torch's operations, and whichever is chosen, against the model's own calls."""

import gc
import weakref

import pytest
import torch
import zoo

from retentive.decoding import program_runner
from retentive.decoding.program_runner import ProgramRunner
from retentive.decoding.recurrent import AHEAD, RecurrentRunner
from retentive.decoding.runner import fastest_threads, runner
from retentive.errors import InputError
from retentive.kernels.cpu.available import available
from retentive.mixers.attention import AttentionConfig
from retentive.models.build import build_model
from retentive.models.language_model import LanguageModel
from retentive.models.state import RetNetState

SIZES = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4}
CONFIGS = {
    "plain": zoo.retnet(**SIZES),
    "gated": zoo.retnet(
        **SIZES,
        gated_ffn=True,
        hidden_act="swish",
        row_scale=True,
        norm="rmsnorm",
        head_norm="rmsnorm",
        ffn_subln="rmsnorm",
        ffn_bias=True,
    ),
    "ablated": zoo.retnet(**SIZES, gate=False, head_norm="none", tie_word_embeddings=True),
    "post-norm": zoo.retnet(
        **SIZES,
        block="post-norm",
        residual_scale=2**0.5,
        final_norm=False,
        embed_scale=8.0,
        embed_norm=True,
        ffn_bias=True,
        ffn_subln="layernorm",
    ),
    "parallel": zoo.retnet(
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
    "xpos": zoo.retnet(
        **SIZES,
        block="output-norm",
        rotation="rope-across-heads",
        xpos_base=32.0,
        gate_bias=True,
        tie_word_embeddings=True,
    ),
    "hybrid": zoo.retnet(
        **SIZES, attention_layers=(0,), attention=AttentionConfig(4, qkv_bias=True, window=8)
    ),
    "transformer": zoo.transformer(**SIZES, num_kv_heads=2, gated_ffn=True),
}
START = AHEAD - 3  # so that the steps cross the end of a table of angles


def build(name: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    config = CONFIGS[name]
    model = build_model(config)
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


@pytest.fixture(params=["compiled", "torch"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether steps are programs; float64 ones never are."""
    if request.param == "torch":
        monkeypatch.setattr(program_runner, "available", lambda: False)
    elif not available():
        pytest.skip("needs numba, and Linux")
    return request.param == "compiled"


@pytest.mark.parametrize("dtype, within", [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_steps_are_as_exact_as_the_models_own_calls(name, tokens, compiled, dtype, within):
    model, exact = build(name, dtype), exact_logits(name, tokens)
    state = ragged_state(model, tokens)
    with torch.no_grad():
        before = error(model(tokens[:, START:], state)[0], exact)
    after = error(stepped(model, tokens, state), exact)
    assert after < within
    assert after < 1.5 * before


def test_a_program_needs_instructions_of_every_mixer(compiled):
    own = ProgramRunner if compiled else RecurrentRunner
    kinds = dict.fromkeys(("plain", "parallel", "xpos"), own)
    for name, kind in {**kinds, "hybrid": RecurrentRunner, "transformer": RecurrentRunner}.items():
        model = build(name)
        assert type(runner(model, model.init_state(1))) is kind


def test_a_runner_is_freed_at_once(compiled):
    """It holds a state and what the steps are made of, none of it in a cycle."""
    model = build("plain")
    decoding = runner(model, model.init_state(2))
    decoding.step(torch.tensor([1, 2]))
    gone = weakref.ref(decoding)
    gc.disable()
    try:
        del decoding
        assert gone() is None
    finally:
        gc.enable()


def test_the_state_given_is_not_changed(tokens, compiled):
    model = build("plain")
    state = ragged_state(model, tokens)
    before = [layer["S"].clone() for layer in state.layers]
    decoding = runner(model, state)
    decoding.step(tokens[:, START])
    assert all(torch.equal(a["S"], b) for a, b in zip(state.layers, before, strict=True))
    assert state.positions.tolist() == [START, START - 2, START]
    assert decoding.state.positions.tolist() == [START + 1, START - 1, START + 1]


def test_the_runners_state_goes_on_in_the_model(tokens):
    model = build("gated", torch.float64)
    decoding = runner(model, ragged_state(model, tokens))
    decoding.step(tokens[:, START])
    with torch.no_grad():
        logits, _ = model(tokens[:, START + 1 :], decoding.state)
    torch.testing.assert_close(logits, exact_logits("gated", tokens)[:, 1:])


def test_far_positions_keep_their_angles(tokens, compiled):
    """At 10^6 a float32 angle would be off by 0.05; the steps must be right to float32."""
    model, exact = build("plain"), build("plain", torch.float64)
    far = RetNetState(torch.full((3,), 10**6), exact.init_state(3).layers)
    with torch.no_grad():
        expected, _ = exact(tokens, far)
    far = RetNetState(torch.full((3,), 10**6), model.init_state(3).layers)
    decoding = runner(model, far)
    logits = torch.stack([decoding.step(column) for column in tokens.unbind(1)], 1)
    assert error(logits, expected) < 2e-6


def test_tokens_out_of_range_are_refused(compiled):
    model = build("plain")
    with pytest.raises(InputError, match="0 to 60"):
        runner(model, model.init_state(1)).step(torch.tensor([61]))


@pytest.mark.parametrize("name", ["plain", "gated", "ablated"])
def test_logits_do_not_depend_on_the_number_of_threads(name, tokens, compiled):
    """Else the measured choice of threads could change what is written."""
    model = build(name)
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
