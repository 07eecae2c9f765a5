"""Activations under the names that other code has for them."""

import json
import shutil

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from transformers.activations import ACT2FN

import retentive
from retentive.convert.activations import TORCHSCALE_NAMES, TRANSFORMERS_NAMES, XATL_NAMES
from retentive.convert.conversion import convert
from retentive.convert.plan import plan
from retentive.convert.source import open_source
from retentive.errors import InputError
from retentive.layers.activations import ACTIVATIONS
from retentive.models.checkpoint import save_model
from retentive.models.config import RetNetConfig

TORCHSCALE = "D1_torchscale_deepnorm"
FIELDS = {  # fixture: the field that names its activation, and the names that its code knows
    TORCHSCALE: ("activation_fn", TORCHSCALE_NAMES),
    "D3_torchscale_2023_08": ("activation_fn", TORCHSCALE_NAMES),
    "D4_syncdoth_v2_tied": ("activation_fn", TORCHSCALE_NAMES),
    "D7_yet_another_retnet_normlast": ("activation", TORCHSCALE_NAMES),
    "D9_xatl_410m": ("activation_fn", XATL_NAMES),
}


@pytest.fixture
def renamed(golden, tmp_path):
    """A golden checkpoint whose config says another activation, opened."""

    def make(name: str, **fields: str) -> RetNetConfig:
        folder = shutil.copytree(golden / name, tmp_path / "renamed", dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))
        made = plan(open_source(folder)).config
        assert isinstance(made, RetNetConfig)
        return made

    return make


@pytest.mark.parametrize("name", TRANSFORMERS_NAMES)
def test_a_name_of_transformers_is_the_same_function_here(name: str) -> None:
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    ours = ACTIVATIONS[TRANSFORMERS_NAMES[name]](x)
    # gelu_fast has the root of 2/π to ten digits.
    torch.testing.assert_close(ours, ACT2FN[name](x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fixture", FIELDS)
def test_every_activation_that_a_dialect_knows_opens(renamed, fixture: str) -> None:
    field, names = FIELDS[fixture]
    for theirs, ours in names.items():
        config = renamed(fixture, **{field: theirs})
        assert config.ffn.act == ours
        assert config.mixer.gate_act == (ours if field == "activation" else "swish")


@pytest.mark.parametrize("fixture", FIELDS)
def test_others_are_refused_with_those_that_are_known(renamed, fixture: str) -> None:
    field, names = FIELDS[fixture]
    with pytest.raises(InputError) as caught:
        renamed(fixture, **{field: "relu2"})
    assert f"{field} is 'relu2'; known here are gelu, relu" in str(caught.value)
    assert str(caught.value).endswith(f" and {list(names)[-1]}")


def test_relu_is_applied_to_what_torchscale_calls_fc1(golden, renamed) -> None:
    """GLU(x) = (relu(x fc1) ⊙ x gate) fc2."""
    model = retentive.RetNet(renamed(TORCHSCALE, activation_fn="relu"))
    model.load_state_dict(retentive.load(golden / TORCHSCALE).state_dict())
    (path,) = (golden / TORCHSCALE).glob("*.pt")
    theirs = torch.load(path, weights_only=True)
    fc1, gate, fc2 = (theirs[f"layers.0.ffn.{name}.weight"] for name in ("fc1", "gate", "fc2"))
    x = torch.randn(3, fc1.shape[1], generator=torch.Generator().manual_seed(0))
    wanted = ((x @ fc1.T).clamp(min=0) * (x @ gate.T)) @ fc2.T
    torch.testing.assert_close(model.layers[0].ffn(x), wanted)


def test_of_fla_before_february_2025_it_is_the_gate_that_is_named(golden, tmp_path) -> None:
    """Its FFN was swish all the same; the norm is fused with a gate of swish only."""
    given = golden / "D6_fla_fused_gate"
    weights = {
        name.replace("g_norm_swish_gate", "g_norm"): tensor
        for name, tensor in load_file(given / "model.safetensors").items()
    }
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((given / "config.json").read_text())
    for theirs, ours in TRANSFORMERS_NAMES.items():
        (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": theirs}))
        made = plan(open_source(tmp_path)).config
        assert (made.ffn.act, made.mixer.gate_act) == ("swish", ours)
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "mish"}))
    with pytest.raises(InputError, match="hidden_act is 'mish'; known here are gelu, "):
        plan(open_source(tmp_path))


def test_fla_knows_but_swish_since(renamed) -> None:
    with pytest.raises(InputError, match="hidden_act is 'relu'; only 'swish' is known here"):
        renamed("D6_fla_hybrid", hidden_act="relu")


@pytest.mark.parametrize(
    ("to", "act", "reason"),
    [
        ("torchscale", "relu2", "activation_fn is 'relu2'"),
        ("torchscale", "gelu_tanh", "activation_fn is 'gelu_tanh'"),
        ("fla", "relu", "hidden_act is 'relu', there 'swish'"),
    ],
)
def test_an_activation_that_the_target_lacks_is_not_written(tmp_path, to, act, reason) -> None:
    rules = {"torchscale": ("official", True), "fla": ("rope", False)}
    rotation, row_scale = rules[to]
    config = zoo.retnet(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=1,
        num_heads=2,
        rotation=rotation,
        row_scale=row_scale,
        norm="rmsnorm",
        head_norm="rmsnorm",
        gated_ffn=True,
        hidden_act=act,
    )
    save_model(retentive.RetNet(config), tmp_path / "ours")
    with pytest.raises(InputError) as caught:
        convert(tmp_path / "ours", tmp_path / "theirs", to=to)
    assert f"{to} cannot hold" in str(caught.value) and reason in str(caught.value)
    assert not (tmp_path / "theirs").exists()
