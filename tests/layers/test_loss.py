"""The loss by chunks is plain cross entropy, and never holds the logits it is made of."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from retentive.errors import InputError
from retentive.layers import loss as losses
from retentive.layers.loss import linear_cross_entropy


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "chunk_rows", lambda vocab_size, device: 8)


def inputs(dtype: torch.dtype = torch.float64, ignored: bool = True) -> tuple[Tensor, ...]:
    generator = torch.manual_seed(0)
    h = torch.randn(3, 9, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(50, 16, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, 50, (3, 9), generator=generator)
    if ignored:
        targets[0, :4] = -100
        targets[2, 8] = -100
    return h, weight, targets


def plain(h: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy((h @ weight.T).flatten(0, 1), targets.flatten(), reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignored", [False, True])
def test_is_cross_entropy(reduction: str, ignored: bool) -> None:
    h, weight, targets = inputs(ignored=ignored)
    given = linear_cross_entropy(h, weight, targets, reduction)
    wanted = plain(h, weight, targets, reduction)
    torch.testing.assert_close(given, wanted, rtol=1e-13, atol=0)
    scale = 0.37  # as a gradient scaler or an accumulated step would
    for one, other in zip(
        torch.autograd.grad(scale * given, (h, weight)),
        torch.autograd.grad(scale * wanted, (h, weight)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("frozen", [0, 1])
def test_one_side_may_be_frozen(frozen: int) -> None:
    *sides, targets = inputs()
    sides[frozen].requires_grad_(False)
    learned = sides[1 - frozen]
    (given,) = torch.autograd.grad(linear_cross_entropy(*sides, targets, "mean"), learned)
    (wanted,) = torch.autograd.grad(plain(*sides, targets, "mean"), learned)
    torch.testing.assert_close(given, wanted, rtol=1e-11, atol=1e-13)


def test_without_gradients() -> None:
    h, weight, targets = inputs()
    with torch.no_grad():
        given = linear_cross_entropy(h, weight, targets, "sum")
    assert not given.requires_grad
    torch.testing.assert_close(given, plain(h, weight, targets, "sum").detach(), rtol=1e-13, atol=0)


def test_no_target_at_all_is_zero() -> None:
    h, weight, targets = inputs()
    given = linear_cross_entropy(h, weight, torch.full_like(targets, -100), "mean")
    given.backward()
    assert given == 0
    assert not h.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights(dtype: torch.dtype) -> None:
    """At most twice the error of plain low precision, both against float64."""
    low, exact = inputs(dtype), [x.detach().double() for x in inputs(dtype)[:2]]
    for x in exact:
        x.requires_grad_()
    wanted = torch.autograd.grad(plain(*exact, low[2], "sum"), exact)
    given = linear_cross_entropy(*low, "sum")
    assert given.dtype == torch.float32
    ours = torch.autograd.grad(given, low[:2])
    theirs = torch.autograd.grad(plain(*low, "sum"), low[:2])
    for one, other, truth in zip(ours, theirs, wanted, strict=True):
        assert one.dtype == dtype
        assert (one.double() - truth).norm() <= 2 * (other.double() - truth).norm()


@pytest.mark.parametrize("tied", [False, True])
def test_under_autocast(make_model, tokens: Tensor, tied: bool) -> None:
    model = make_model("retnet", tie_word_embeddings=tied).float()
    found = []
    for plainly in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            h, _ = model.hidden(tokens)
            if plainly:
                logits = model.head(h)
                assert logits.dtype == torch.bfloat16
                value = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
            else:
                value = model.loss(h, tokens)
        found.append((value, torch.autograd.grad(value, list(model.parameters()))))
    (given, grads), (wanted, plain_grads) = found
    torch.testing.assert_close(given, wanted, rtol=1e-2, atol=0)
    for one, other in zip(grads, plain_grads, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() <= 0.05 * other.norm() + 1e-6


@pytest.mark.parametrize("tied", [False, True])
def test_the_whole_model_learns_the_same(make_model, tokens: Tensor, tied: bool) -> None:
    model = make_model("retnet", tie_word_embeddings=tied)
    h, _ = model.hidden(tokens)
    weights = list(model.parameters())
    given = torch.autograd.grad(model.loss(h, tokens), weights, retain_graph=True)
    logits = model.head(h).flatten(0, 1)
    wanted = torch.autograd.grad(F.cross_entropy(logits, tokens.flatten()), weights)
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


class Largest(TorchDispatchMode):
    """Records the most elements of any tensor an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_never_exist_as_a_whole(dtype: torch.dtype) -> None:
    tokens, words, width = 400, 300, 8
    h = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(words, width, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, words, (tokens,))
    with Largest() as ours:
        linear_cross_entropy(h, weight, targets, "mean").backward()
    with Largest() as theirs:
        F.cross_entropy(h @ weight.T, targets).backward()
    assert theirs.elements == tokens * words
    assert ours.elements <= max(8 * words, tokens * width, words * width)


def test_chunks_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for words in (256, 8192, 50304, 10**7):
        rows = losses.chunk_rows(words, torch.device("cpu"))
        assert rows == 128 or rows * words <= 2**22


def test_a_second_backward_is_as_the_first() -> None:
    h, weight, targets = inputs()
    value = linear_cross_entropy(h, weight, targets, "mean")
    first = torch.autograd.grad(value, (h, weight), retain_graph=True)
    again = torch.autograd.grad(2 * value, (h, weight))
    for one, other in zip(first, again, strict=True):
        torch.testing.assert_close(2 * one, other, rtol=0, atol=0)


def test_second_derivatives_are_refused() -> None:
    h, weight, targets = inputs()
    value = linear_cross_entropy(h, weight, targets, "mean")
    (slope,) = torch.autograd.grad(value.square(), h, create_graph=True)
    with pytest.raises(InputError, match="differentiable once"):
        slope.sum().backward()
