"""Every kernel at full size on a GPU against float64; small ones: `tests/kernels/triton`."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from retentive.layers.rotation import Rotation, rotate
from retentive.mixers.attention import CausalMask, SlidingWindow, attend_packed
from retentive.ops import retention, retention_step
from retentive.ops.decay import log_decay

pytestmark = pytest.mark.gpu

HEADS = [(64, 128), (128, 256), (256, 512)]
RETENTIONS = [  # not all of them: each is compiled in every configuration that is tuned over
    *((*head, torch.bfloat16, "ieee") for head in HEADS),
    (128, 256, torch.float16, "ieee"),
    (64, 128, torch.float32, "ieee"),
    (256, 512, torch.float32, "ieee"),
    (256, 512, torch.float32, "tf32"),
]
# Relative L2 against float64, two to twelve times what plain arithmetic in the dtype was seen to
# give (float32 with IEEE products).
WITHIN = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
TF32_WITHIN = 1e-3
EPS = 1e-6


def error(result: Tensor, exact: Tensor) -> float:
    result, exact = result.detach(), exact.detach()
    return float((result.double() - exact).norm() / exact.norm())


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def rotation(K: int, H: int) -> Rotation:
    return Rotation(K, "official", 10000.0, K**-0.5, log_decay(H)).to("cuda")


@pytest.fixture
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of float32 products."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, request.param
    yield request.param
    matmul.fp32_precision = before


@pytest.mark.parametrize("T", [1, 1000, 8192])
@pytest.mark.parametrize("K, V, dtype, precision", RETENTIONS, indirect=["precision"])
def test_retention_and_its_gradients(K, V, dtype, precision, T):
    within = TF32_WITHIN if precision == "tf32" else WITHIN[dtype]
    H = 4
    q, k = (random(1, T, H, K, dtype=dtype, seed=seed) * K**-0.5 for seed in (0, 1))
    v, do = (random(1, T, H, V, dtype=dtype, seed=seed) for seed in (2, 3))
    state, dstate = (random(1, H, K, V, seed=seed) for seed in (4, 5))
    rates = log_decay(H).cuda()

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        wide = torch.promote_types(dtype, torch.float32)
        inputs.append(state.detach().to(wide).requires_grad_())
        *tokens, initial = inputs
        o, final = retention(*tokens, rates, state=initial, form="chunkwise", backend=backend)
        gradients = torch.autograd.grad((o, final), inputs, (do.to(dtype), dstate.to(wide)))
        return [o, final, *gradients]

    names = ("o", "final", "dq", "dk", "dv", "dstate")
    for name, result, exact in zip(
        names, run("triton", dtype), run("torch", torch.float64), strict=True
    ):
        assert error(result, exact) < within, name


@pytest.mark.parametrize("dtype", WITHIN)
@pytest.mark.parametrize("K", [64, 128, 256])
def test_rotation(K, dtype):
    from retentive.kernels.triton.rotation import rotate_qk

    positions = torch.arange(10**6, 10**6 + 8192, device="cuda")[None]
    q, k, dq, dk = (random(1, 8192, 8, K, dtype=dtype, seed=seed) for seed in range(4))
    inputs = [x.requires_grad_() for x in (q, k)]
    turned = rotate_qk(*inputs, *rotation(K, 8)(positions, torch.float32))
    gradients = torch.autograd.grad(turned, inputs, (dq, dk))
    angles = rotation(K, 8)(positions, torch.float64)
    doubles = [x.detach().double().requires_grad_() for x in (q, k)]
    exact = [rotate(x, *angles[n : n + 2]) for x, n in zip(doubles, (0, 2), strict=True)]
    exact += torch.autograd.grad(exact, doubles, (dq.double(), dk.double()))
    for result, reference in zip((*turned, *gradients), exact, strict=True):
        assert error(result, reference) < WITHIN[dtype]


@pytest.mark.parametrize("dtype", WITHIN)
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("V", [128, 256, 512])
def test_norm_and_gate(V, norm, dtype):
    from retentive.kernels.triton.norm_gate import norm_gate

    o, gate, dy = (
        random(1, 8192, *shape, dtype=dtype, seed=seed)
        for seed, shape in enumerate([(8, V), (8 * V,), (8 * V,)])
    )
    weight, bias = random(V, seed=3), random(V, seed=4) if norm == "layernorm" else None

    def run(function: Callable[..., Tensor], copy: Callable[[Tensor], Tensor]) -> list[Tensor]:
        inputs = [None if x is None else copy(x).requires_grad_() for x in (o, gate, weight, bias)]
        y = function(*inputs)
        y.backward(copy(dy))
        return [y, *(x.grad for x in inputs if x is not None)]

    def plain(o: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if norm == "layernorm":
            return F.silu(gate) * F.layer_norm(o, (V,), weight, bias, EPS).flatten(-2)
        return F.silu(gate) * F.rms_norm(o, (V,), weight, EPS).flatten(-2)

    results = run(lambda *inputs: norm_gate(*inputs, norm, "swish", EPS), Tensor.clone)
    for result, exact in zip(results, run(plain, Tensor.double), strict=True):
        assert error(result, exact) < WITHIN[dtype]


@pytest.mark.parametrize("dtype", WITHIN)
@pytest.mark.parametrize("B, T", [(1, 1), (64, 1), (3, 5)], ids=["slices", "heads", "tokens"])
@pytest.mark.parametrize("K, V", HEADS)
def test_decode_step(K, V, B, T, dtype):
    from retentive.kernels.triton.decode import decode_step

    H = 8
    q, k = (random(B, T, H, K, dtype=dtype, seed=seed) for seed in (0, 1))
    v, gate = random(B, T, H, V, dtype=dtype, seed=2), random(B, T, H * V, dtype=dtype, seed=3)
    state = random(B, H, K, V, seed=4)
    active = torch.arange(B, device="cuda") % 3 != 1
    positions = torch.arange(B, device="cuda")[:, None] * 1000 + torch.arange(T, device="cuda")
    rates = log_decay(H).cuda()
    angles = rotation(K, H)(positions, torch.float64)
    turned = rotate(q.double(), *angles[:2]), rotate(k.double(), *angles[2:])
    o, final = retention_step(*turned, v.double(), rates, state.double(), active=active)
    exact = F.silu(gate.double()) * F.layer_norm(o, (V,), eps=EPS).flatten(-2)
    tables = rotation(K, H)(positions, torch.float32)
    y = decode_step(
        q, k, v, gate, state, rates.exp().float()[:, None], *tables,
        active, None, None, "layernorm", "swish", EPS,
    )  # fmt: skip
    assert error(y, exact) < WITHIN[dtype]
    assert error(state, final) < WITHIN[torch.float32]


@pytest.mark.parametrize("mask", [CausalMask(), SlidingWindow(100)], ids=["causal", "window"])
def test_packed_attention_of_different_lengths_and_its_gradients(mask):
    bounds = torch.tensor([0, 700, 700, 701, 1024])

    def run(dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (
            random(1, heads, 1024, 64, dtype=torch.bfloat16, seed=seed).to(dtype).requires_grad_()
            for seed, heads in enumerate((8, 4, 4))
        )
        o = attend_packed(mask, q, (k, v), bounds)
        do = random(1, 8, 1024, 64, dtype=torch.bfloat16, seed=3).to(dtype)
        return [o, *torch.autograd.grad(o, (q, k, v), do)]

    for result, exact in zip(run(torch.bfloat16), run(torch.float64), strict=True):
        assert error(result, exact) < WITHIN[torch.bfloat16]
