"""RetNet in the precisions it is used in: its forms agree, bfloat16 stays near float32."""

import copy

import pytest
import torch
import zoo
from torch import Tensor

from retentive.errors import InputError
from retentive.models.retnet import RetNet
from retentive.ops import FORMS

LENGTH = 4096


def relative(given: Tensor, wanted: Tensor) -> float:
    return ((given.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.fixture(
    params=[
        {},
        {"head_norm": "rmsnorm", "norm": "rmsnorm", "row_scale": True, "decay": "linspace"},
        {"head_norm": "none", "gate": False, "row_scale": True, "decay": (0.0, -0.01)},
    ],
    ids=["paper", "official", "ablated"],
)
def long_model(request) -> tuple[RetNet, Tensor, Tensor]:
    """A model whose projections are larger than at the start of training, tokens, its logits."""
    config = zoo.retnet(
        vocab_size=256, hidden_size=128, num_hidden_layers=2, num_heads=2, **request.param
    )
    model = RetNet(config).eval()
    model.init_weights(seed=0)
    tokens = torch.randint(0, 256, (1, LENGTH), generator=torch.manual_seed(0))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.mul_(3)
        return model, tokens, model(tokens)[0]


@torch.no_grad()
def test_forms_agree_over_long_texts(long_model) -> None:
    model, tokens, logits = long_model
    exact, state = copy.deepcopy(model).double()(tokens)
    for form in FORMS:
        given, after = model.set_kernels(form=form)(tokens)
        assert relative(given, exact) <= 1e-5
        assert relative(given, logits) <= 1e-5
        for one, other in zip(after.layers, state.layers, strict=True):
            assert relative(one["S"], other["S"]) <= 1e-5


@torch.no_grad()
def test_split_into_calls_in_float32(long_model) -> None:
    model, tokens, logits = long_model
    state, pieces = None, []
    for piece in tokens.tensor_split([1000, 1001, 1002, 3000], 1):
        given, state = model(piece, state)
        pieces.append(given)
    assert relative(torch.cat(pieces, 1), logits) <= 1e-5


@torch.no_grad()
def test_bfloat16_stays_near_float32(long_model) -> None:
    model, tokens, logits = long_model
    low = copy.deepcopy(model).to(torch.bfloat16)
    given, state = low(tokens)
    assert given.dtype == torch.bfloat16
    assert relative(given, logits) <= 0.05
    _, state = low(tokens[:, :-1])
    assert relative(low(tokens[:, -1:], state)[0], logits[:, -1:]) <= 0.05


def test_set_kernels_reaches_every_layer_and_refuses_unknown_words() -> None:
    model = RetNet(zoo.retnet(vocab_size=9, hidden_size=16, num_hidden_layers=2, num_heads=2))
    tokens = torch.arange(8)[None]
    assert model.set_kernels(form="chunkwise", backend="reference", chunk_size=3) is model
    given = {(x.retention.form, x.retention.backend, x.retention.chunk_size) for x in model.layers}
    assert given == {("chunkwise", "reference", 3)}
    one = model(tokens)[0]
    torch.testing.assert_close(one, model.set_kernels()(tokens)[0])
    with pytest.raises(InputError, match="did you mean 'parallel'"):
        model.set_kernels(form="paralel")(tokens)
    with pytest.raises(InputError, match="torch"):
        model.set_kernels(backend="tritn")(tokens)


def test_names_of_the_weights() -> None:
    config = zoo.retnet(
        vocab_size=9, hidden_size=16, num_hidden_layers=1, num_heads=2, gated_ffn=True
    )
    assert set(RetNet(config).state_dict()) == {
        "embed_tokens.weight",
        *(f"layers.0.retention.{x}_proj.weight" for x in "qkvgo"),
        *(f"layers.0.ffn.{x}_proj.weight" for x in ("gate", "up", "down")),
        *(f"layers.0.{x}_norm.{y}" for x in ("retention", "ffn") for y in ("weight", "bias")),
        "norm.weight",
        "norm.bias",
        "lm_head.weight",
    }
