"""RMSNorm against torch's own in float64."""

import copy

import pytest
import torch
from torch import nn

from retentive.layers import cpu_training
from retentive.layers.norms import RMSNorm


@pytest.fixture(autouse=True)
def for_any_size(monkeypatch):
    monkeypatch.setattr(cpu_training, "MANY_VALUES", 0)
    torch.manual_seed(0)  # seven numbers may cancel: once in a thousand times 4 eps are too few


def gradients(norm, x, dy):
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(dy.to(y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in norm.parameters())]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 48), (1, 7), (2, 3, 4, 16)])
def test_values_and_gradients_are_those_of_torch_in_float64(shape, dtype, affine):
    ours = RMSNorm(shape[-1], eps=1e-3, elementwise_affine=affine)
    for weight in ours.parameters():
        nn.init.normal_(weight)
    theirs = nn.RMSNorm(shape[-1], eps=1e-3, elementwise_affine=affine).double()
    ours = ours.to(dtype)
    theirs.load_state_dict(ours.state_dict())
    x, dy = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    exact = gradients(theirs, x.double(), dy.double())
    # Every number is a sum of products of these, rounded once on the way out.
    bound = 4 * torch.finfo(dtype).eps
    for got, want in zip(gradients(ours, x, dy), exact, strict=True):
        assert got.dtype == dtype
        assert (got.double() - want).norm() <= bound * max(want.norm(), 1)


def test_without_a_graph_it_is_the_same_to_the_last_bit():
    norm, x = RMSNorm(24, eps=1e-6), torch.randn(3, 24)
    with torch.no_grad():
        alone = norm(x)
    assert torch.equal(alone, norm(x))
    assert torch.equal(torch.cat([norm(row) for row in x.split(1)]), alone)


def test_gradcheck():
    norm = RMSNorm(6, eps=1e-2).double()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(norm, {"weight": w}, x), (x, norm.weight)
    )


def test_keeps_its_input_and_one_number_a_row():
    norm, x, kept = RMSNorm(64, eps=1e-6), torch.randn(10, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm(x)
    assert sum(t.numel() for t in kept) == 10 * 64 + 64 + 10


def test_compiles_and_copies():
    norm, x = RMSNorm(8, eps=1e-6), torch.randn(2, 8)
    compiled = torch.compile(copy.deepcopy(norm), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), norm(x))
