"""The fused rotation against the model's own in float64, forward and backward."""

import pytest
import torch
from torch import Tensor

from retentive.kernels.triton.rotation import rotate_qk
from retentive.layers.rotation import Angles, Rotation, rotate
from retentive.ops.decay import log_decay

# Relative L2. Four roundings of float32 an element; or the one of the result to bfloat16, 2^-9.
WITHIN = {torch.float32: 3e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


def angles(K: int, positions: Tensor, dtype: torch.dtype, heads: int | None = None) -> Angles:
    decays = None if heads is None else log_decay(heads)
    return Rotation(K, "official", 10000.0, K**-0.5, decays)(positions, dtype)


@pytest.fixture
def random(device: torch.device):
    def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)

    return draw


@pytest.mark.parametrize("dtype", WITHIN)
@pytest.mark.parametrize("shape", [(2, 37, 3, 16), (1, 5, 2, 20), (2, 1, 1, 64), (1, 70, 2, 6)])
def test_turned_as_in_float64(shape, dtype, device, random):
    batch, length, heads, K = shape
    q, k = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    positions = torch.arange(length).expand(batch, -1) + torch.arange(batch)[:, None] * 1000
    positions = positions.to(device)
    turned = rotate_qk(q, k, *angles(K, positions, torch.float32, heads))
    exact = angles(K, positions, torch.float64, heads)
    for result, x, cos, sin in ((turned[0], q, *exact[:2]), (turned[1], k, *exact[2:])):
        assert result.dtype == dtype and result.is_contiguous()
        assert error(result, rotate(x.double(), cos, sin)) < WITHIN[dtype]


def test_right_at_a_million(device, random):
    """With float32 angles the error would be 0.05."""
    positions = 10**6 + torch.arange(9, device=device)[None]
    q = random(1, 9, 2, 32)
    turned, _ = rotate_qk(q, q, *angles(32, positions, torch.float32))
    exact = angles(32, positions, torch.float64)
    assert error(turned, rotate(q.double(), exact.cos, exact.sin)) < WITHIN[torch.float32]


def test_parts_of_wider_rows_and_fewer_key_heads(device, random):
    """q and k as views of one projection; a key head may be that of several query heads."""
    wide = random(2, 11, 4 * 24 + 2 * 24)
    q, k = (x.unflatten(-1, (-1, 24)) for x in wide.split((4 * 24, 2 * 24), -1))
    tables = angles(24, torch.arange(11, device=device)[None], torch.float32)
    turned_q, turned_k = rotate_qk(q, k, *tables)
    torch.testing.assert_close(turned_q, rotate(q, tables.cos, tables.sin))
    torch.testing.assert_close(turned_k, rotate(k, tables.key_cos, tables.key_sin))


def test_gradients(device, random):
    positions = torch.arange(13, device=device)[None]
    tables = angles(20, positions, torch.float32, heads=3)
    exact = angles(20, positions, torch.float64, heads=3)
    q, k, dq, dk = (random(2, 13, 3, 20, seed=seed) for seed in range(4))
    inputs = [x.clone().requires_grad_() for x in (q, k)]
    torch.autograd.backward(rotate_qk(*inputs, *tables), (dq, dk))
    doubles = [x.double().requires_grad_() for x in (q, k)]
    outputs = rotate(doubles[0], *exact[:2]), rotate(doubles[1], *exact[2:])
    torch.autograd.backward(outputs, (dq.double(), dk.double()))
    for x, double in zip(inputs, doubles, strict=True):
        assert x.grad is not None and double.grad is not None
        assert error(x.grad, double.grad) < WITHIN[torch.float32]


def test_is_a_sound_custom_op(device, random):
    q, k = (random(1, 3, 2, 8, seed=seed).requires_grad_() for seed in range(2))
    tables = angles(8, torch.arange(3, device=device)[None], torch.float32)
    torch.library.opcheck(rotate_qk, (q, k, *tables))
