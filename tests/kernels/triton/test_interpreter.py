"""In the interpreter bfloat16 is what it is in torch, bit for bit, and tf32 has its 10 bits."""

import pytest
import torch
import triton
import triton.language as tl

N = 32


def _elementwise(a, b, out, N: tl.constexpr):
    n = tl.arange(0, N)
    x, y = tl.load(a + n), tl.load(b + n)
    tl.store(out + n, x + y)
    tl.store(out + N + n, x * y)
    tl.store(out + 2 * N + n, -x)
    tl.store(out + 3 * N + n, tl.where(x < y, x, y))
    tl.store(out + 4 * N + n, (x.to(tl.float32) * 1.2345).to(tl.bfloat16))
    tl.store(out + 5 * N + n, x * 0.5)


def _product(a, b, out, N: tl.constexpr, PRECISION: tl.constexpr):
    n = tl.arange(0, N)
    at = n[:, None] * N + n[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision=PRECISION))


@pytest.fixture
def run(device, interpreted):
    """Kernels are defined here, where the environment says that they are to be interpreted."""

    def run(function, *arguments, **constants):
        triton.jit(function)[(1,)](*arguments, N=N, **constants)

    return run


def test_bf16_elementwise_is_that_of_torch(run, device):
    a, b = (torch.randn(N, device=device).bfloat16() for _ in range(2))
    a[:4] = torch.tensor([float("inf"), -0.0, float("nan"), 1e-40])
    out = torch.empty(6, N, device=device, dtype=torch.bfloat16)
    run(_elementwise, a, b, out)
    scaled = (a.float() * 1.2345).bfloat16()
    exact = [a + b, a * b, -a, torch.where(a < b, a, b), scaled, a * 0.5]
    torch.testing.assert_close(out, torch.stack(exact), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "precision", "bound"),
    [
        (torch.bfloat16, "ieee", 1e-6),
        (torch.float16, "ieee", 1e-6),
        (torch.float32, "ieee", 1e-6),
        (torch.float32, "tf32", 6e-4),
    ],
)
def test_products_are_summed_in_float32(run, device, dtype, precision, bound):
    a, b = (torch.randn(N, N, device=device).to(dtype) for _ in range(2))
    out = torch.empty(N, N, device=device)
    run(_product, a, b, out, PRECISION=precision)
    exact = a.double() @ b.double()
    error = ((out - exact).norm() / exact.norm()).item()
    assert error < bound
    assert precision == "ieee" or error > 1e-5
