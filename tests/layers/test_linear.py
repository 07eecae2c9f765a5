"""Linear layers on oneDNN against torch's own, and what a backward that computes again repeats."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from retentive.layers import cpu_training
from retentive.layers.cpu_training import MANY_ROWS, product, suits_onednn
from retentive.layers.linear import Linear
from retentive.layers.norms import RMSNorm


def layer_and_input(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Linear, torch.Tensor]:
    torch.manual_seed(0)
    return Linear(48, 80).to(dtype), torch.randn(2, rows // 2, 48, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("rows", [2, MANY_ROWS, 300])
def test_values_and_gradients_are_those_of_a_linear_layer(rows):
    layer, x = layer_and_input(rows)
    dy = torch.randn(2, rows // 2, 80)
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (x, layer.weight)]
        if dtype == torch.float32:
            y = layer(x)
            results.append((y, *torch.autograd.grad(y, (x, layer.weight), dy)))
        else:
            y = F.linear(*inputs)
            results.append((y, *torch.autograd.grad(y, inputs, dy.double())))
    for got, exact in zip(*results, strict=True):
        assert (got - exact).norm() <= 1e-6 * exact.norm()


def test_only_what_needs_a_gradient_gets_one():
    layer, x = layer_and_input(200)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is None
    layer.weight.requires_grad_()
    layer(x.detach()).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        y = layer(x)
        assert y.grad_fn is None
        torch.testing.assert_close(layer(x[:1, :1]), y[:1, :1], rtol=1e-5, atol=1e-5)


def test_a_backward_can_be_repeated():
    layer, x = layer_and_input(200)
    y = layer(x).square().sum()
    y.backward(retain_graph=True)
    once = layer.weight.grad.clone()
    y.backward()
    torch.testing.assert_close(layer.weight.grad, 2 * once)


def test_products_take_transposed_views():
    a, b = torch.randn(70, 90), torch.randn(70, 110)
    torch.testing.assert_close(product(a.T, b.T), a.T @ b, rtol=1e-5, atol=1e-4)


def test_where_onednn_is_left_alone():
    x = torch.randn(MANY_ROWS, 8)
    assert suits_onednn(x)
    assert not suits_onednn(x[:-1]) and not suits_onednn(x.double()) and not suits_onednn(x.half())
    with torch.no_grad():
        assert suits_onednn(x[:1]) and not suits_onednn(x[:0])
    with torch.autocast("cpu", torch.bfloat16):
        assert not suits_onednn(x)
        assert Linear(8, 4)(x).dtype == torch.bfloat16


def test_it_compiles_as_one_graph():
    layer, x = layer_and_input(200)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)


def test_a_last_product_is_not_formed_again(monkeypatch):
    """Its input is computed again for the backward, its output is not."""
    layer, x = layer_and_input(200)
    forward_shapes = []

    def counted(x, weight, bias=None):
        forward_shapes.append((x.shape[1], weight.shape[0]))
        return product(x, weight)

    monkeypatch.setattr(cpu_training, "product", counted)
    y = checkpoint(lambda t: layer(F.gelu(t)), x, use_reentrant=False)
    y.sum().backward()
    assert forward_shapes.count((48, 80)) == 1
    assert len(forward_shapes) == 3  # and the two of the backward


@pytest.mark.parametrize("trained", ["x", "weight"])
def test_only_what_the_backward_needs_is_kept(trained):
    """With frozen weights no inputs: of these an adapter's training would keep the most."""
    layer, x = layer_and_input(200)
    layer.weight.requires_grad_(trained == "weight")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
        layer(x.requires_grad_(trained == "x"))
    assert kept == [layer.weight.shape if trained == "x" else x.flatten(0, 1).shape]


@pytest.mark.parametrize("rows", [2, MANY_ROWS, 300])
@pytest.mark.parametrize("only_bias", [False, True])
def test_a_bias_is_added_and_trained(rows, only_bias):
    torch.manual_seed(0)
    layer = Linear(48, 80, bias=True)
    torch.nn.init.normal_(layer.bias)
    layer.weight.requires_grad_(not only_bias)
    x, dy = torch.randn(rows, 48, requires_grad=not only_bias), torch.randn(rows, 80)
    trained = [t for t in (x, layer.weight, layer.bias) if t.requires_grad]
    found = (layer(x), *torch.autograd.grad(layer(x), trained, dy))
    exact = {
        t: t.detach().double().requires_grad_(t.requires_grad) for t in (x, *layer.parameters())
    }
    y = F.linear(*exact.values())
    wanted = (y, *torch.autograd.grad(y, [exact[t] for t in trained], dy.double()))
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()


def normed_input(rows: int = 2 * MANY_ROWS, width: int = 512):
    torch.manual_seed(0)
    norm, layers = RMSNorm(width, eps=1e-6), [Linear(width, 40), Linear(width, 24)]
    torch.nn.init.normal_(norm.weight)
    return norm, layers, torch.randn(1, rows, width, requires_grad=True)


def gradients(norm, layers, x, change=lambda y: y):
    y = change(norm(x))
    total = sum((layer(y).sin()).sum() for layer in layers)
    return torch.autograd.grad(total, [x, norm.weight, *(layer.weight for layer in layers)])


@pytest.mark.parametrize("change", [lambda y: y, lambda y: y.mul_(2.0), lambda y: y * 2.0])
def test_gradients_behind_a_norm_are_those_of_float64(change):
    norm, layers, x = normed_input()
    got = gradients(norm, layers, x, change)
    exact = gradients(norm.double(), [layer.double() for layer in layers], x.double(), change)
    for one, other in zip(got, exact, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()


def test_what_a_norm_gave_is_not_kept():
    norm, layers, x = normed_input()
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        y = norm(x)
        for layer in layers:
            layer(y)
    weights = norm.weight.numel() + sum(layer.weight.numel() for layer in layers)
    assert sum(t.numel() for t in kept.values()) == x.numel() + x.shape[1] + weights


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@torch.no_grad()
def test_a_model_can_be_traced():
    layer, x = layer_and_input(200)
    traced = torch.jit.trace(layer, x)
    torch.testing.assert_close(traced(x), layer(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_does_not_fit_is_refused_in_torchs_words():
    layer, _ = layer_and_input(2)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        layer(torch.zeros(2, 47))
    with pytest.raises(RuntimeError, match="dtype"):
        layer.double()(torch.zeros(2, 48))
