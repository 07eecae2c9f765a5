"""Configs: what is left out is filled in, what is wrong is said in a line."""

import json

import pytest
import torch
import zoo

from retentive.errors import InputError
from retentive.mixers.attention import AttentionConfig
from retentive.models import counts
from retentive.models.config import (
    SIZES,
    RetNetConfig,
    TransformerConfig,
    config_from_dict,
)
from retentive.models.flat import RETNET, SPARSE
from retentive.models.matching import matching_transformer
from retentive.models.retnet import RetNet
from retentive.models.transformer import Transformer

SMALL = {"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2}
HYBRID = {"attention_layers": [1], "attention": {"num_heads": 2}}


def test_defaults_are_the_papers_layer() -> None:
    config = zoo.retnet(**SMALL)
    assert (config.mixer.qk_dim, config.mixer.value_dim, config.ffn_dim) == (64, 128, 128)
    assert (config.mixer.qk_head_dim, config.mixer.value_head_dim) == (32, 64)
    assert (config.ffn.act, config.norm, config.mixer.head_norm) == (
        "gelu",
        "layernorm",
        "layernorm",
    )
    assert (config.mixer.decay, config.mixer.rotation, config.mixer.row_scale) == (
        "power",
        "official",
        False,
    )
    assert (config.norm_eps, config.mixer.head_norm_eps, config.ffn.gated) == (1e-6, 1e-6, False)


@pytest.mark.parametrize("width", [256, 1024, 2048])
@pytest.mark.parametrize("kind", [RetNetConfig, TransformerConfig])
def test_a_gated_ffn_has_as_many_parameters(kind, width: int) -> None:
    sizes = {**SMALL, "hidden_size": width}
    plain, gated = (kind.from_dict({**sizes, "gated_ffn": gated}) for gated in (False, True))
    assert counts.parameters(gated)["ffn"] == pytest.approx(
        counts.parameters(plain)["ffn"], rel=0.01
    )


LAYER_WEIGHTS = {  # 12·L·D²
    "demo": 12 * 3 * 192**2,
    "200m": 12 * 16 * 1024**2,
    "1.3b": 12 * 24 * 2048**2,
    "2.7b": 12 * 32 * 2560**2,
    "6.7b": 12 * 32 * 4096**2,
    "13b": 12 * 40 * 5120**2,
}


@pytest.mark.parametrize("size", SIZES)
def test_named_sizes_have_the_papers_parameters(size: str) -> None:
    config = RetNetConfig.named(size)
    with torch.device("meta"):
        model = RetNet(config)
    width, depth = config.hidden_size, config.num_hidden_layers
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * width
    norms = (2 * depth + 1) * 2 * width
    assert model.num_parameters() == LAYER_WEIGHTS[size] + embeddings + norms
    if size != "demo":
        assert (config.mixer.qk_head_dim, config.mixer.value_head_dim) == (256, 512)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("group", [1, 2, 4])
def test_the_matching_transformer_is_equally_large(size: str, group: int) -> None:
    retnet = RetNetConfig.named(size)
    heads = matching_transformer(retnet).mixer.num_heads
    config = matching_transformer(retnet, num_kv_heads=max(1, heads // group))
    with torch.device("meta"):
        given, wanted = Transformer(config).num_parameters(), RetNet(retnet).num_parameters()
    assert given == pytest.approx(wanted, rel=0.01)
    assert 64 <= config.hidden_size // config.mixer.num_heads <= 128
    shared = ("hidden_size", "num_hidden_layers", "vocab_size", "norm", "tie_word_embeddings")
    assert all(getattr(config, name) == getattr(retnet, name) for name in shared)


def test_the_matching_transformer_of_another_kind_of_ffn() -> None:
    retnet = RetNetConfig.named("200m", gated_ffn=True, hidden_act="swish", norm="rmsnorm")
    config = matching_transformer(retnet, num_kv_heads=4)
    assert (config.ffn.gated, config.ffn.act, config.norm) == (True, "swish", "rmsnorm")
    given, wanted = (sum(counts.parameters(c).values()) for c in (config, retnet))
    assert given == pytest.approx(wanted, rel=0.01)


def test_the_matching_transformer_of_a_retnet_without_a_gate() -> None:
    retnet = RetNetConfig.named("200m", gate=False)
    given, wanted = (
        sum(counts.parameters(c).values()) for c in (matching_transformer(retnet), retnet)
    )
    assert given == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize(
    "config",
    [
        zoo.retnet(**SMALL, decay=(-0.1, 0.0), row_scale=True),
        zoo.retnet(**SMALL, gate=False, head_norm="none"),
        RetNetConfig.named("200m", tie_word_embeddings=True),
        zoo.retnet(**SMALL, block="post-norm", residual_scale=8**0.25, final_norm=False),
        zoo.retnet(**SMALL, xpos_base=512.0, rotation="rope-across-heads", ffn_subln="rmsnorm"),
        zoo.retnet(**SMALL, attention_layers=(0,), attention=AttentionConfig(2, window=7)),
        zoo.transformer(**SMALL, num_kv_heads=1),
    ],
)
def test_json_there_and_back(config) -> None:
    fields = json.loads(json.dumps(config.to_dict()))
    assert config_from_dict(fields) == config
    bookkeeping = {
        "architectures": ["RetentiveForCausalLM"],
        "torch_dtype": "float32",
        "dtype": "float32",
        "transformers_version": "5.17.0",
        "_name_or_path": "",
        "bos_token_id": None,
        "use_cache": True,
    }
    assert config_from_dict({**fields, **bookkeeping}) == config


def test_a_plain_retnet_writes_no_field_that_only_others_need() -> None:
    plain = zoo.retnet(**SMALL).to_dict()
    assert not SPARSE & plain.keys()
    assert plain.keys() >= {"hidden_size", "decay", "rotation", "row_scale"}
    set_by_hand = zoo.retnet(**SMALL, num_kv_heads=1, attention_layers=()).to_dict()
    assert set_by_hand.keys() - plain.keys() == {"num_kv_heads"}
    assert SPARSE - {"window"} <= RETNET.keys()


def test_attention_may_be_given_by_its_fields() -> None:
    """As a TOML table or JSON has it."""
    given = zoo.retnet(**SMALL, attention_layers=(1,), attention={"num_heads": 4, "window": 8})
    assert given.other_mixer == AttentionConfig(4, window=8)
    assert (given.other_mixer.kv_heads, given.other_mixer.qkv_bias) == (4, False)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hiden_size": 3}, ["'hiden_size'", "'hidden_size'"]),
        ({"hidden_act": "swich"}, ["'swich'", "did you mean 'swish'", "relu2 or swish"]),
        ({"decay": "powr"}, ["'powr'", "did you mean 'power'", "a list of numbers"]),
        ({"decay": [-0.1]}, ["1 log decays", "2 heads"]),
        ({"decay": [0.1, 0.0]}, ["≤ 0"]),
        ({"decay": [-1, "x"]}, ["decay", "a list of numbers"]),
        ({"hidden_size": "64"}, ["hidden_size", "'64'", "a whole number"]),
        ({"hidden_size": True}, ["hidden_size", "True", "a whole number"]),
        ({"hidden_size": 64.0}, ["hidden_size", "64.0", "a whole number"]),
        ({"gated_ffn": 1}, ["ffn.gated", "true or false"]),
        ({"norm_eps": "small"}, ["norm_eps", "a number"]),
        ({"norm_eps": 0}, ["norm_eps", "above 0"]),
        ({"rotation_base": float("nan")}, ["rotation_base", "nan"]),
        ({"vocab_size": 0}, ["vocab_size", "above 0"]),
        ({"num_hidden_layers": -1}, ["num_hidden_layers", "above 0"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers", "at most 10000"]),
        ({"intermediate_size": 0}, ["intermediate_size", "above 0"]),
        ({"dropout": 1.0}, ["dropout", "[0, 1)"]),
        ({"num_heads": 3}, ["qk_dim 64", "num_heads 3"]),
        ({"num_heads": 0}, ["num_heads", "above 0"]),
        ({"value_dim": 129}, ["value_dim 129", "num_heads 2"]),
        ({"qk_dim": 6}, ["qk_dim 6", "odd", "3"]),
        ({"block": "prenorm"}, ["'prenorm'", "did you mean 'pre-norm'", "parallel"]),
        ({"residual_scale": 0}, ["residual_scale", "above 0"]),
        ({"embed_scale": -1.0}, ["embed_scale", "above 0"]),
        ({"head_bias": True, "tie_word_embeddings": True}, ["tied head", "head_bias"]),
        ({"gate_bias": True, "gate": False}, ["gate_bias", "without a gate"]),
        ({"head_norm_affine": True, "head_norm": "none"}, ["head_norm_affine", "none"]),
        ({"num_kv_heads": 0}, ["num_kv_heads", "above 0"]),
        ({"num_heads": 4, "num_kv_heads": 3}, ["num_heads 4", "num_kv_heads 3"]),
        ({"rotary_dim": 5}, ["rotary_dim is 5", "even", "32"]),
        ({"rotary_dim": 34}, ["rotary_dim is 34", "2 to the head dim 32"]),
        ({"rotation": "rope-across-heads", "rotary_dim": 4}, ["rope-across-heads", "rotary_dim"]),
        ({"rotation": "rope-across-heads", "num_kv_heads": 1}, ["across-heads", "num_kv_heads"]),
        ({"xpos_base": 0.0}, ["xpos_base", "above 0"]),
        ({"attention_layers": [1]}, ["attention_layers", "both or neither"]),
        ({"attention": {"num_heads": 2}}, ["attention_layers", "both or neither"]),
        ({**HYBRID, "attention_layers": [2]}, ["(attention_layers) is [2]", "0 to 1"]),
        ({**HYBRID, "attention_layers": [1, 0]}, ["[1, 0]", "rising"]),
        ({**HYBRID, "attention_layers": [1.5]}, ["other_layers", "a list of numbers"]),
        ({**HYBRID, "attention": {"num_heads": 3}}, ["hidden_size 64", "attention num_heads 3"]),
        ({**HYBRID, "attention": {"num_heads": 64}}, ["odd head dim 1"]),
        ({**HYBRID, "attention": {"heads": 2}}, ["other_mixer attention key 'heads'", "num_heads"]),
        ({**HYBRID, "attention": {}}, ["attention lacks 'num_heads'"]),
        ({**HYBRID, "attention": {"num_heads": 4, "num_kv_heads": 3}}, ["num_kv_heads 3"]),
        ({**HYBRID, "attention": {"num_heads": 4, "window": 0}}, ["attention window", "above 0"]),
        ({**HYBRID, "attention": {"num_heads": 4, "window": 8.5}}, ["window", "a whole number"]),
    ],
)
def test_refuses_a_wrong_field(fields: dict, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        RetNetConfig.from_dict({**SMALL, **fields})
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: RetNetConfig.named("1.3"), ["'1.3'", "did you mean '1.3b'", "13b"]),
        (lambda: RetNetConfig.named("demo", heads=2), ["'heads'", "num_heads"]),
        (lambda: RetNetConfig.from_dict({"hidden_size": 8}), ["lacks 'vocab_size'"]),
        (lambda: config_from_dict({"model_type": "llama"}), ["'llama'", "retentive-transformer"]),
        (lambda: config_from_dict({}), ["None", "retentive"]),
        (lambda: zoo.transformer(**SMALL, num_kv_heads=3), ["num_heads 2", "num_kv_heads 3"]),
        (lambda: zoo.transformer(**{**SMALL, "num_heads": 64}), ["odd head dim 1"]),
        (
            lambda: matching_transformer(RetNetConfig.named("demo"), num_kv_heads=2),
            ["num_kv_heads 2"],
        ),
        (
            lambda: matching_transformer(RetNetConfig.named("demo"), num_kv_heads=0),
            ["num_kv_heads", "above 0"],
        ),
    ],
)
def test_refuses_what_cannot_be(call, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_lists_are_taken_for_tuples():
    decay = [-0.5, -0.25]
    config = zoo.retnet(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_heads=2, decay=decay)
    assert config.mixer.decay == tuple(decay)
    assert RetNetConfig.from_dict(config.to_dict()) == config
