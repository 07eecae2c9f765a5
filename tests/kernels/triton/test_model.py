"""Models whose layers run by kernels, against the same models in plain torch in float64."""

import pytest
import torch
import zoo
from torch import Tensor

from retentive.decoding.graphs import GraphRunner
from retentive.decoding.recurrent import RecurrentRunner
from retentive.models.retnet import RetNet

SIZES = {
    "vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2, "value_dim": 40,
}  # fmt: skip
CONFIGS = {
    "plain": zoo.retnet(**SIZES),
    "affine": zoo.retnet(**SIZES, head_norm_affine=True, gate_act="gelu", row_scale=True),
    "grouped": zoo.retnet(**SIZES, num_kv_heads=1, head_norm="rmsnorm", rotation="rope"),
    "without": zoo.retnet(**SIZES, gate=False, head_norm="none", rotary_dim=6),
}
WITHIN = 5e-6  # relative L2, a layer of float32


@pytest.fixture(params=CONFIGS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tokens(device: torch.device) -> Tensor:
    return torch.randint(31, (3, 11), generator=torch.Generator().manual_seed(0)).to(device)


@pytest.fixture
def build(device: torch.device):
    def build(name: str, dtype: torch.dtype, backend: str) -> RetNet:
        model = RetNet(CONFIGS[name])
        model.init_weights(seed=0)
        return model.to(device, dtype).set_kernels(backend=backend)

    return build


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.detach().double() - exact).norm() / exact.norm())


def test_forward_and_backward(build, name, tokens):
    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        model = build(name, dtype, backend)
        logits, state = model(tokens)
        weight = torch.linspace(-1, 1, logits.numel(), dtype=dtype, device=logits.device)
        parameters = list(model.parameters())
        gradients = torch.autograd.grad((logits.flatten() * weight).sum(), parameters)
        return [logits, *(layer["S"] for layer in state.layers), *gradients]

    exact = run(torch.float64, "torch")
    for result, reference in zip(run(torch.float32, "triton"), exact, strict=True):
        assert error(result, reference.detach()) < WITHIN


@torch.no_grad()
def test_token_by_token_by_its_own_calls(build, tokens):
    model, state = build("plain", torch.float32, "triton"), None
    for token in tokens[:, :4].split(1, dim=1):
        logits, state = model(token, state)
    exact, _ = build("plain", torch.float64, "torch")(tokens[:, :4])
    assert error(logits[:, -1], exact[:, -1]) < WITHIN


def test_in_bfloat16_by_autocast(build, tokens):
    """The dtypes that meet in a layer: bfloat16 projections, float32 tables and weights."""
    model = build("affine", torch.float32, "triton")
    with torch.autocast(tokens.device.type, torch.bfloat16):
        loss = model.loss(model.hidden(tokens)[0], tokens)
    loss.backward()
    plain = build("affine", torch.float64, "torch")
    exact = plain.loss(plain.hidden(tokens)[0], tokens)
    assert abs(loss.item() - exact.item()) < 1e-2 * exact.item()
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo
def test_compiles_as_one_graph(build, tokens):
    model = build("affine", torch.float32, "triton")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    parameters = list(model.parameters())
    expected, result = model(tokens)[0], compiled(tokens)[0]
    torch.testing.assert_close(result, expected)
    gradients = torch.autograd.grad(result.square().sum(), parameters)
    for x, y in zip(
        gradients, torch.autograd.grad(expected.square().sum(), parameters), strict=True
    ):
        torch.testing.assert_close(x, y)


def test_decoding_by_slots(build, name, tokens):
    """Three rows of four slots, as they are recorded on a GPU, and steps that are not recorded."""
    model, plain = build(name, torch.float32, "triton"), build(name, torch.float64, "torch")
    with torch.inference_mode():
        exact = RecurrentRunner(plain, plain(tokens[:, :8])[1])
        state = model(tokens[:, :8])[1]
        slots = GraphRunner(model, state, lambda step: step)
        steps = RecurrentRunner(model, state.clone())
    for column in tokens[:, 8:].unbind(1):
        logits = exact.step(column)
        assert error(slots.step(column), logits) < WITHIN
        assert error(steps.step(column), logits) < WITHIN
    for one, other in zip(slots.state.layers, exact.state.layers, strict=True):
        assert error(one["S"], other["S"]) < WITHIN
