"""What only some dialects have: decays of their own, projections in one, options in the weights."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import retentive
from retentive.convert.plan import plan
from retentive.convert.source import open_source
from retentive.errors import InputError


@pytest.fixture
def spoil(golden, tmp_path):
    """A golden checkpoint, its config and tensors changed, as a folder."""

    def make(name: str, change=lambda tensors: None, **fields) -> Path:
        given = golden / name
        stored = given / "model.safetensors"
        tensors = load_file(stored) if stored.is_file() else None
        if tensors is None:
            (path,) = [p for p in given.iterdir() if p.suffix in (".pt", ".bin")]
            tensors = torch.load(path, weights_only=True)
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        change(tensors)
        config = json.loads((given / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, **fields}))
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        return tmp_path

    return make


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        plan(open_source(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "title", "key"),
    [
        ("D3_torchscale_2023_08", "torchscale's of mid 2023", "layers.0.retention.q_proj.bias"),
        ("D5_syncdoth_v1", "syncdoth's RetNet, version 1", "model.blocks.0.msr.qkv.weight"),
        ("D7_yet_another_retnet_normlast", "yet-another-retnet's", ".retention.thetas"),
        ("D9_xatl_410m", "RetNet-XATL", "rotary_percentage in config.json"),
    ],
)
def test_it_is_told_apart_and_said_by_what(golden, name, title, key):
    told = plan(open_source(golden / name)).told
    assert title in told and key in told


# RetNet-XATL


def test_decays_are_those_stored(spoil):
    def other_decays(tensors):
        tensors["model.retnet_rel_pos.decay"] = torch.tensor([-0.5, -0.25, -0.125, 0.0])

    model = retentive.load(spoil("D9_xatl_410m", other_decays, use_lm_decay=True))
    given = [math.log(2) * rate for rate in (-0.5, -0.25, -0.125, 0.0)]
    assert model.config.mixer.decay == pytest.approx(given)


def test_without_stored_decays_they_follow_the_rule(spoil):
    folder = spoil("D9_xatl_410m", lambda tensors: tensors.pop("model.retnet_rel_pos.decay"))
    assert retentive.load(folder).config.mixer.decay == "power"


def test_options_that_no_public_model_has(spoil):
    made = plan(open_source(spoil("D9_xatl_410m", retnet_stability_update=True))).config
    assert made.mixer.row_scale
    made = plan(open_source(spoil("D9_xatl_410m", parallel_residual=False))).config
    assert (made.block, made.final_norm) == ("pre-norm", True)

    def affine_head_norms(tensors):
        for layer in (0, 1):
            for kind in ("weight", "bias"):
                tensors[f"model.layers.{layer}.retention.group_norm.{kind}"] = torch.ones(16)

    made = plan(open_source(spoil("D9_xatl_410m", affine_head_norms, groupnorm_affine=True))).config
    assert (made.mixer.head_norm, made.mixer.head_norm_affine) == ("layernorm", True)

    def gated(tensors):
        for layer in (0, 1):
            start = f"model.layers.{layer}.ffn."
            for kind in ("weight", "bias"):
                tensors[f"{start}gate.{kind}"] = tensors[f"{start}fc1.{kind}"].clone()

    model = retentive.load(spoil("D9_xatl_410m", gated, use_glu=True))
    assert model.layers[1].ffn.gate_proj.bias is not None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"shared_attention_norm": True}, "shared_attention_norm is True"),
        ({"hybrid_attention_layers": [1]}, "hybrid_attention_layers is (1,)"),
        ({"retnet_bottleneck": 32}, "retnet_bottleneck is 32"),
        ({"deepnorm": True}, "parallel_residual"),
        ({"activation_fn": "tanh"}, "activation_fn is 'tanh'"),
        ({"rotary_percentage": 0.01}, "rotary_dim is 0"),
        ({"rotary_percentage": 0.5}, "angle"),
        ({"groupnorm_affine": True}, "lacks model.layers.0.retention.group_norm.weight"),
    ],
)
def test_what_is_not_known_of_xatl(spoil, fields, words):
    assert words in refusal(spoil("D9_xatl_410m", **fields))


# syncdoth, version 1


def test_projections_in_one_are_taken_apart_with_their_bias(spoil):
    def add_biases(tensors):
        for layer in (0, 1):
            start = f"model.blocks.{layer}.msr."
            tensors[f"{start}qkv.bias"] = torch.arange(64.0 + 64 + 96)
            tensors[f"{start}gated.bias"] = torch.ones(96)
            tensors[f"{start}proj.bias"] = torch.ones(64)

    model = retentive.load(spoil("D5_syncdoth_v1", add_biases))
    retention = model.layers[1].retention
    pairs = [*range(0, 16, 2), *range(1, 16, 2)]  # of the first head, K 16
    assert retention.q_proj.bias[:16].tolist() == pairs
    assert retention.k_proj.bias[16:32].tolist() == [64 + 16 + dim for dim in pairs]
    assert retention.v_proj.bias.tolist() == list(range(128, 224))
    assert (model.config.mixer.gate_bias, model.config.mixer.out_bias) == (True, True)


def test_a_head_of_its_own(spoil):
    assert "holds a head of its own" in refusal(
        spoil("D5_syncdoth_v1", lambda t: t.update({"lm_head.weight": torch.ones(97, 64)}))
    )
    model = retentive.load(
        spoil(
            "D5_syncdoth_v1",
            lambda t: t.update({"lm_head.weight": torch.ones(97, 64)}),
            tie_word_embeddings=False,
        )
    )
    assert torch.equal(model.lm_head.weight, torch.ones(97, 64))


def test_its_decays_are_those_of_its_config(spoil):
    def power(tensors):
        for layer in (0, 1):
            tensors[f"model.blocks.{layer}.msr.decay"] = 1 - 2 ** (-5 - torch.arange(4.0))

    assert "msr.decay that is not" in refusal(spoil("D5_syncdoth_v1", power))
    model = retentive.load(spoil("D5_syncdoth_v1", power, use_default_gamma=True))
    assert model.config.mixer.decay == "power"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_its_decays_are_those_of_its_config_in_any_precision(spoil, dtype):
    """Rounded to bfloat16 the two rules are nowhere more than one number apart."""

    def store(tensors):
        tensors |= {key: tensor.to(dtype) for key, tensor in tensors.items()}

    assert plan(open_source(spoil("D5_syncdoth_v1", store))).config.mixer.decay == "linspace"
    other = spoil("D5_syncdoth_v1", store, use_default_gamma=True)
    assert "msr.decay that is not" in refusal(other)


def test_a_decay_of_whole_numbers_is_not_the_configs(spoil):
    key = "model.blocks.0.msr.decay"
    folder = spoil("D5_syncdoth_v1", lambda t: t.update({key: torch.ones(4, dtype=torch.int64)}))
    assert f"{key} that is not" in refusal(folder)


# yet-another-retnet


def test_norms_and_activations_of_yet_another(spoil):
    name = "D7_yet_another_retnet_normlast"
    made = plan(open_source(spoil(name, norm_first=True, activation="gelu"))).config
    assert (made.block, made.ffn.act, made.mixer.gate_act) == ("pre-norm", "gelu", "gelu")
