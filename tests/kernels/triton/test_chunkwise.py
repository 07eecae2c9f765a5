"""The Triton op against the float64 reference, forward and backward, on the GPU or interpreted.

Scratch and outputs are full of NaN before (conftest). Tolerances, relative L2: what plain
arithmetic of that precision gives over thousands of terms, as in tests/ops/test_retention.py, and
for tf32 the 10 bits of its operands.
"""

from itertools import pairwise

import pytest
import torch
import triton

from retentive.errors import InputError
from retentive.kernels.triton import output, states
from retentive.kernels.triton.chunkwise import chunkwise
from retentive.kernels.triton.spans import Spans
from retentive.ops import reference, retention
from retentive.ops.decay import log_decay
from retentive.ops.packing import for_each_sequence

TOLERANCE = {  # dtype: (outputs and states, gradients)
    torch.float32: (2e-6, 5e-6),
    torch.bfloat16: (6e-3, 1.2e-2),
    torch.float16: (1e-3, 2e-3),
}
C = 64


def relative_error(x, exact):
    return ((x.detach().cpu().double() - exact).norm() / exact.norm()).item()


def random_inputs(B, T, H, K, V, *, dtype=torch.bfloat16, sequences=None, seed=0):
    """q, k, v in `dtype`, a state, and gradients of o and of the final state."""
    g = torch.Generator().manual_seed(seed)
    q, k, v, do = (torch.randn(B, T, H, X, generator=g).to(dtype) for X in (K, K, V, V))
    state, dfinal = (torch.randn(sequences or B, H, K, V, generator=g) for _ in range(2))
    return q, k * K**-0.5, v, state, do, dfinal


def exact(inputs, rates, cu_seqlens=None):
    """o, the final state and the gradients of q, k, v and the state, in float64."""
    *given, do, dfinal = (x.double() for x in inputs)
    leaves = [x.requires_grad_() for x in given]
    o, final = for_each_sequence(reference.parallel, *leaves[:3], rates, leaves[3], cu_seqlens)
    grads = torch.autograd.grad([o, final], leaves, [do, dfinal])
    return o.detach(), final.detach(), *grads


def computed(inputs, rates, device, cu_seqlens=None, chunk_size=C):
    *leaves, do, dfinal = (x.to(device) for x in inputs)
    leaves = [x.requires_grad_() for x in leaves]
    rates = rates.to(device, torch.float32)
    o, final = chunkwise(*leaves[:3], rates, leaves[3], cu_seqlens, chunk_size)
    grads = torch.autograd.grad([o, final], leaves, [do, dfinal])
    return o, final, *grads


def assert_close(results, expected, dtype):
    forward, backward = TOLERANCE[dtype]
    bounds = [forward, forward, *[backward] * 4]
    for result, e, bound in zip(results, expected, bounds, strict=True):
        assert relative_error(result, e) <= bound


@pytest.mark.parametrize(
    ("dtype", "B", "T", "H", "K", "V"),
    [
        (torch.bfloat16, 1, 150, 2, 32, 64),
        (torch.bfloat16, 2, 1, 1, 16, 16),
        (torch.bfloat16, 1, 64, 1, 64, 128),
        (torch.bfloat16, 1, 130, 1, 100, 72),
        (torch.float16, 1, 65, 2, 24, 40),
        (torch.float32, 1, 65, 2, 24, 40),
        (torch.float32, 2, 100, 1, 32, 16),
    ],
)
def test_forward_and_backward(dtype, B, T, H, K, V, device):
    inputs = random_inputs(B, T, H, K, V, dtype=dtype)
    rates = log_decay(H)
    assert_close(computed(inputs, rates, device), exact(inputs, rates), dtype)


@pytest.mark.parametrize("rates", [[0.0], [-1e-9], [-5.0], [-80.0]])
def test_any_decay(rates, device):
    inputs = random_inputs(1, 70, 1, 16, 16, dtype=torch.float32)
    rates = log_decay(1, rates)
    assert_close(computed(inputs, rates, device), exact(inputs, rates), torch.float32)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("lengths", [[70, 0, 1, 64, 1], [0, 130, 0], [1, 1, 1]])
def test_packed_sequences_are_each_alone(lengths, split, device, monkeypatch):
    monkeypatch.setattr(states, "_leaves_idle", lambda *_: split)
    inputs = random_inputs(1, sum(lengths), 1, 16, 32, sequences=len(lengths))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    rates = log_decay(1)
    results = computed(inputs, rates, device, bounds)
    assert_close(results, exact(inputs, rates, bounds), torch.bfloat16)
    for n, (start, stop) in enumerate(pairwise(bounds.tolist())):
        if start == stop:
            assert torch.equal(results[1][n].cpu(), inputs[3][n])
            assert torch.equal(results[5][n].cpu(), inputs[5][n])


def test_chunks_at_once_or_one_after_the_other(device, monkeypatch):
    inputs = random_inputs(1, 140, 1, 16, 32, dtype=torch.float32)
    rates = log_decay(1)
    results = []
    for split in (False, True):
        monkeypatch.setattr(states, "_leaves_idle", lambda *_, split=split: split)
        results.append(computed(inputs, rates, device))
    assert_close(results[1], exact(inputs, rates), torch.float32)
    for whole, apart in zip(*results, strict=True):
        assert relative_error(apart, whole.detach().cpu().double()) < 1e-6


def test_a_gpu_is_filled_by_heads_or_by_chunks(monkeypatch):
    monkeypatch.setattr(states, "_multiprocessors", lambda device: 132)
    cpu = torch.device("cpu")
    assert not states._leaves_idle(16, 256, 512, cpu)  # 16 tiles a head
    assert states._leaves_idle(32, 64, 128, cpu)
    assert not states._leaves_idle(132, 64, 128, cpu)


@pytest.mark.parametrize("blocks", [(128, 64, 32, 64, 16), (64, 32, 16, 32, 32)])
def test_every_shape_of_tiles(blocks, device, monkeypatch):
    """BLOCK_M of several BLOCK_N, scores from one block of X or several, Y in parts."""

    def configs(*_):
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_X", "BLOCK_Y", "BLOCK_S")
        return [triton.Config(dict(zip(names, blocks, strict=True)))]

    monkeypatch.setattr(output, "output_configs", configs)
    inputs = random_inputs(1, 170, 1, 24, 40)
    rates = log_decay(1)
    results = computed(inputs, rates, device, chunk_size=128)
    assert_close(results, exact(inputs, rates), torch.bfloat16)


@pytest.fixture
def allow_tf32():
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    yield
    matmul.fp32_precision = before


def test_float32_in_tf32_where_torch_may(allow_tf32, device):
    inputs = random_inputs(1, 70, 1, 16, 16, dtype=torch.float32)
    rates = log_decay(1)
    results = computed(inputs, rates, device)
    errors = [relative_error(x, e) for x, e in zip(results, exact(inputs, rates), strict=True)]
    assert all(1e-5 < error < 1e-3 for error in errors)


def test_without_a_state_it_begins_at_zero(device):
    q, k, v, state, do, _ = (x.to(device) for x in random_inputs(1, 70, 1, 16, 16))
    rates = log_decay(1).to(device, torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o, _ = chunkwise(*leaves, rates, None, None, C)
    o_zero, _ = chunkwise(*leaves, rates, torch.zeros_like(state), None, C)
    assert torch.equal(o, o_zero)
    grads = torch.autograd.grad(o, leaves, do)  # none reaches the final state
    for x, e in zip(grads, torch.autograd.grad(o_zero, leaves, do), strict=True):
        assert torch.equal(x, e)


def test_inputs_need_not_be_contiguous(device):
    *inputs, _, _ = (x.to(device) for x in random_inputs(2, 70, 2, 16, 16))
    rates = log_decay(2).to(device, torch.float32)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    for x, e in zip(
        chunkwise(*views[:3], rates, views[3], None, C),
        chunkwise(*inputs[:3], rates, inputs[3], None, C),
        strict=True,
    ):
        assert torch.equal(x, e) and x.is_contiguous()


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed, device):
    """Packed from a state, and a batch from nothing."""
    q, k, v, state, _, _ = random_inputs(1, 20, 1, 16, 16, sequences=2 if packed else 1)
    leaves = [x.to(device).requires_grad_() for x in (q, k, v)]
    initial = state.to(device).requires_grad_() if packed else None
    bounds = torch.tensor([0, 2, 20]) if packed else None
    rates = log_decay(1).to(device, torch.float32)
    torch.library.opcheck(chunkwise, (*leaves, rates, initial, bounds, C))


def test_compiles_into_one_graph(device):
    inputs = [x.to(device).requires_grad_() for x in random_inputs(1, 70, 1, 16, 16)[:4]]
    rates = log_decay(1).to(device)

    def run(q, k, v, state):
        o, final = retention(q, k, v, rates, state=state, backend="triton")
        return o.float().sin().sum() + final.sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(run(*inputs), inputs)
    for x, e in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        assert torch.equal(x, e)


def test_backward_keeps_its_inputs_and_nothing_else(device):
    leaves = [x.to(device).requires_grad_() for x in random_inputs(1, 130, 1, 16, 16)[:4]]
    rates, kept = log_decay(1).to(device, torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        chunkwise(*leaves[:3], rates, leaves[3], None, C)
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in (*leaves, rates)}


def test_tables_of_spans():
    x = torch.empty(1, 300, 1, 1)
    spans = Spans.of(x, torch.tensor([0, 130, 130, 131, 300]), 64)
    assert (spans.sequences, spans.chunks) == (4, 7)
    rows = [[0, 130, 0], [130, 130, 3], [130, 131, 3], [131, 300, 4]]
    assert spans.sequence_table.tolist() == rows
    chunks = [[0, 64], [64, 128], [128, 130], [130, 131], [131, 195], [195, 259], [259, 300]]
    assert spans.chunk_table.tolist() == [[*c, n] for n, c in enumerate(chunks)]
    with pytest.raises(InputError, match="rise from 0 to T = 300"):
        Spans.of(x, torch.tensor([0, 299]), 64)
