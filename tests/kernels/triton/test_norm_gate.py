"""The fused norm and gate against torch's own in float64, forward and backward."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from retentive.kernels.triton import norm_gate as module
from retentive.kernels.triton.norm_gate import NORMS, launch_norm_gate, norm_gate
from retentive.layers.activations import ACTIVATIONS

# Relative L2. Sums of V float32 terms and the hardware's reciprocal root; or one final rounding.
WITHIN = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
EPS = 1e-5


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


@pytest.fixture
def random(device: torch.device):
    def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)

    return draw


@pytest.fixture
def operands(random):
    """o, gate, weight and bias, None where there is none."""

    def draw(
        norm: str, affine: bool, gated: bool, shape: tuple[int, ...], dtype: torch.dtype
    ) -> list[Tensor | None]:
        batch, length, heads, V = shape
        o = random(*shape, dtype=dtype) + 0.5  # a mean that the layernorm has to take away
        gate = random(batch, length, heads * V, dtype=dtype, seed=1) if gated else None
        weight = random(V, seed=2) + 1 if affine and norm != "none" else None
        bias = random(V, seed=3) if affine and norm == "layernorm" else None
        return [o, gate, weight, bias]

    return draw


def plain(
    o: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, norm: str,
    act: str = "swish",
) -> Tensor:  # fmt: skip
    if norm == "layernorm":
        o = F.layer_norm(o, o.shape[-1:], weight, bias, EPS)
    elif norm == "rmsnorm":
        o = F.rms_norm(o, o.shape[-1:], weight, EPS)
    y = o.flatten(-2)
    return y if gate is None else ACTIVATIONS[act](gate) * y


def double(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


@pytest.mark.parametrize("dtype", WITHIN)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("affine, gated", [(False, True), (True, True), (True, False)])
def test_forward(operands, norm, affine, gated, dtype):
    inputs = operands(norm, affine, gated, (2, 19, 3, 20), dtype)
    y = norm_gate(*inputs, norm, "swish", EPS)
    assert y.dtype == dtype
    assert error(y, plain(*map(double, inputs), norm)) < WITHIN[dtype]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("affine, gated", [(False, True), (True, True), (True, False)])
def test_backward(operands, random, norm, affine, gated, monkeypatch):
    monkeypatch.setattr(module, "TILES", 2)  # so that there are several programs
    inputs = operands(norm, affine, gated, (2, 65, 3, 20), torch.float32)
    dy = random(2, 65, 60, seed=9)
    given = [None if x is None else x.clone().requires_grad_() for x in inputs]
    norm_gate(*given, norm, "swish", EPS).backward(dy)
    exact = [None if x is None else x.double().requires_grad_() for x in inputs]
    plain(*exact, norm).backward(dy.double())
    for x, reference in zip(given, exact, strict=True):
        if x is not None:
            assert error(x.grad, reference.grad) < 2 * WITHIN[torch.float32]


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_other_activations(operands, random, act):
    inputs = operands("rmsnorm", True, True, (1, 33, 2, 16), torch.float32)
    inputs[1] *= 2  # into the tails
    dy = random(1, 33, 32, seed=9)
    given = [None if x is None else x.clone().requires_grad_() for x in inputs]
    y = norm_gate(*given, "rmsnorm", act, EPS)
    y.backward(dy)
    doubles = [None if x is None else x.double().requires_grad_() for x in inputs]
    exact = plain(*doubles, "rmsnorm", act)
    exact.backward(dy.double())
    assert error(y.detach(), exact.detach()) < WITHIN[torch.float32]
    for x, reference in zip(given[:3], doubles[:3], strict=True):
        assert error(x.grad, reference.grad) < 2 * WITHIN[torch.float32]


def test_backward_in_bfloat16(operands, random):
    inputs = operands("rmsnorm", True, True, (1, 33, 2, 64), torch.bfloat16)
    dy = random(1, 33, 128, dtype=torch.bfloat16, seed=9)
    given = [None if x is None else x.clone().requires_grad_() for x in inputs]
    norm_gate(*given, "rmsnorm", "swish", EPS).backward(dy)
    exact = [None if x is None else x.double().requires_grad_() for x in inputs]
    plain(*exact, "rmsnorm").backward(dy.double())
    for x, reference in zip(given, exact, strict=True):
        if x is not None:
            assert x.grad.dtype == x.dtype
            assert error(x.grad, reference.grad) < WITHIN[x.dtype]


def test_a_gate_that_is_a_part_of_wider_rows(random):
    o, wide = random(2, 7, 2, 16), random(2, 7, 50, seed=1)
    gate = wide[..., 9:41]
    exact = plain(o, gate, None, None, "layernorm")
    torch.testing.assert_close(norm_gate(o, gate, None, None, "layernorm", "swish", EPS), exact)
    token = norm_gate(o[:, 3], gate[:, 3], None, None, "layernorm", "swish", EPS)
    torch.testing.assert_close(token, exact[:, 3])  # without a dim of tokens, too


def test_rows_of_slots_that_are_not_active_are_zero(device, random):
    o, gate = random(3, 2, 2, 16), random(3, 2, 32, seed=1)
    o[1], gate[1] = float("nan"), float("nan")
    y = torch.full((3, 2, 32), float("nan"), dtype=torch.bfloat16, device=device)
    active = torch.tensor([True, False, True], device=device)
    launch_norm_gate(o, gate, None, None, "rmsnorm", "swish", EPS, y, active)
    assert not y[1].any()
    exact = plain(o.double(), gate.double(), None, None, "rmsnorm")
    assert error(y[::2], exact[::2]) < WITHIN[torch.bfloat16]


@pytest.mark.parametrize("affine", [False, True])
def test_is_a_sound_custom_op(operands, affine):
    inputs = operands("layernorm", affine, True, (1, 2, 2, 8), torch.float32)
    given = [None if x is None else x.requires_grad_() for x in inputs]
    torch.library.opcheck(norm_gate, (*given, "layernorm", "swish", EPS))
