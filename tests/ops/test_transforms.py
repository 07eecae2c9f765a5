"""Derivatives of every kind and vmap, through the op and through a model, against plain operations.

The recurrent form is plain operations, which torch transforms by itself: it is the oracle.
"""

import pytest
import torch
import zoo
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap

from retentive.errors import InputError
from retentive.ops import retention
from retentive.ops.decay import log_decay

# torch 2.13 scripts its own formulas of forward mode, and warns of that
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

FORMS = ("chunkwise", "parallel")
EXACT = {"rtol": 0.0, "atol": 1e-11}


def inputs(*rows: int, tokens: int = 7) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(*rows, tokens, 2, 4), (*rows, tokens, 2, 4), (*rows, tokens, 2, 3), (*rows, 2, 4, 3)]
    return tuple(torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes)


def run(form: str):
    options = {"chunk_size": 3} if form == "chunkwise" else {}

    def call(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return retention(q, k, v, log_decay(2), state=state, form=form, **options)

    return call


def loss(form: str):
    def call(*given: Tensor) -> Tensor:
        o, final = run(form)(*given)
        return (o**3).sum() + (final**2).sum()

    return call


@pytest.mark.parametrize("form", FORMS)
def test_forward_mode(form):
    given, tangents = inputs(2), tuple(x.cos() for x in inputs(2))
    for mine, wanted in zip(
        jvp(run(form), given, tangents), jvp(run("recurrent"), given, tangents), strict=True
    ):
        torch.testing.assert_close(mine, wanted, **EXACT)
    _, (wanted, _) = jvp(run("recurrent"), given, tangents)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(given, tangents, strict=True)]
        tangent = forward_ad.unpack_dual(run(form)(*duals)[0]).tangent
    torch.testing.assert_close(tangent, wanted, **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives(form):
    """Of a gradient penalty, as create_graph gives it, and by torch.func."""
    found = []
    for which in (form, "recurrent"):
        given = tuple(x.requires_grad_() for x in inputs(1))
        first = torch.autograd.grad(loss(which)(*given), given, create_graph=True)
        found.append(torch.autograd.grad(sum((x**2).sum() for x in first), given))
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-9)
    small = inputs(1, tokens=2)
    hessians = [hessian(loss(which))(*small) for which in (form, "recurrent")]
    torch.testing.assert_close(*hessians, rtol=1e-10, atol=1e-9)


def test_second_derivatives_of_some_inputs_of_packed_sequences():
    q, k, v, _ = (x.requires_grad_() for x in inputs(1))
    bounds, found = torch.tensor([0, 2, 2, 7]), []
    for options in ({"form": "chunkwise", "chunk_size": 2}, {"form": "recurrent"}):
        o, _ = retention(q, k.detach(), v, log_decay(2), cu_seqlens=bounds, **options)
        first = torch.autograd.grad((o**3).sum(), (q, v), create_graph=True)
        found.append(torch.autograd.grad(sum((x**2).sum() for x in first), (q, v)))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_vmap(form):
    """By rules, not by a fallback, which would warn of its speed."""
    q, k, v, state = inputs(3, 2)
    o, final = vmap(run(form))(q, k, v, state)
    alone = [run(form)(*row) for row in zip(q, k, v, state, strict=True)]
    torch.testing.assert_close(o, torch.stack([row[0] for row in alone]), **EXACT)
    torch.testing.assert_close(final, torch.stack([row[1] for row in alone]), **EXACT)
    shared, _ = vmap(run(form), (0, None, None, None))(q, k[0], v[0], state[0])
    torch.testing.assert_close(shared[1], run(form)(q[1], k[0], v[0], state[0])[0], **EXACT)


@pytest.fixture
def model():
    """Wide enough in tokens for the fast paths of a CPU, in float32 where they are taken."""
    return zoo.build("retnet-official", hidden_size=64, num_heads=2).float()


def test_per_sample_gradients_of_a_model(model):
    tokens = torch.randint(61, (3, 300), generator=torch.Generator().manual_seed(0))

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, row: Tensor) -> Tensor:
            return model.loss(model.hidden(row[None])[0], row[None])

    module = Loss()
    weights = {name: weight.detach() for name, weight in module.named_parameters()}
    each = vmap(grad(lambda w, row: functional_call(module, w, (row,))), (None, 0))(weights, tokens)
    for index, row in enumerate(tokens):
        module.zero_grad()
        module(row).backward()
        for name, weight in module.named_parameters():
            wanted = weight.grad
            assert (each[name][index] - wanted).norm() <= 1e-5 * wanted.norm() + 1e-7


def test_a_fast_backward_refuses_a_second_derivative_in_a_line(model):
    tokens = torch.randint(61, (2, 600), generator=torch.Generator().manual_seed(0))
    loss = model.loss(model.hidden(tokens)[0], tokens)
    first = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    with pytest.raises(InputError, match=r"differentiable once; take it by torch\.func") as caught:
        sum((x**2).sum() for x in first).backward()
    assert "\n" not in str(caught.value)
