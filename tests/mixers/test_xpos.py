"""xPos against the decay of each channel that it is, also where its keys would overflow."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from retentive.layers.rotation import exponents
from retentive.mixers.xpos import XPosRetention
from retentive.ops import FORMS
from retentive.ops.decay import log_decay

H, K, V = 2, 8, 3


def channel_by_channel(q, k, v, gamma: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """S_n = γ S_{n-1} + k_nᵀ v_n with gamma `[H,K]`, one row."""
    outputs = []
    for n in range(len(q)):
        state = gamma[:, :, None] * state + k[n, :, :, None] * v[n, :, None, :]
        outputs.append(torch.einsum("hk,hkv->hv", q[n], state))
    return torch.stack(outputs), state


def inputs(rows: int, tokens: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.manual_seed(0)
    shapes = ((rows, tokens, H, K), (rows, tokens, H, K), (rows, tokens, H, V), (rows, H, K, V))
    return [
        torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes
    ]


def layer(base: float) -> tuple[XPosRetention, Tensor]:
    """The layer, and the decay of each channel."""
    e = exponents("rope-across-heads", K // 2, H)
    zeta = ((e + 0.4) / 1.4) ** (1 / base)
    gamma = log_decay(H).exp()[:, None] * torch.cat((zeta, zeta), 1)
    return XPosRetention(e, K, base), gamma


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("segment", [4, 5, 2048])
def test_it_is_a_decay_of_each_channel(form: str, segment: int) -> None:
    retain, gamma = layer(6.0)
    retain.segment = segment
    q, k, v, state = inputs(3, 13)
    o, final = retain(
        q, k, v, log_decay(H), state=state, cu_seqlens=None, output_state=True, form=form
    )
    for row in range(3):
        wanted = channel_by_channel(q[row], k[row], v[row], gamma, state[row])
        torch.testing.assert_close((o[row], final[row]), wanted, rtol=0.0, atol=1e-11)


@pytest.mark.parametrize("segment", [4, 2048])
@pytest.mark.parametrize("carried", [True, False])
def test_packed_sequences(segment: int, carried: bool) -> None:
    retain, gamma = layer(6.0)
    retain.segment = segment
    q, k, v, _ = inputs(1, 14)
    lengths = [9, 0, 1, 4]
    state = inputs(4, 1)[3] if carried else None
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    o, final = retain(
        q, k, v, log_decay(H), state=state, cu_seqlens=bounds, output_state=True, form="chunkwise"
    )
    start = torch.zeros(4, H, K, V, dtype=torch.float64) if state is None else state
    for index, (begin, end) in enumerate(pairwise(bounds)):
        if begin == end:
            torch.testing.assert_close(final[index], start[index], rtol=0.0, atol=0.0)
            continue
        piece = (x[0, begin:end] for x in (q, k, v))
        wanted = channel_by_channel(*piece, gamma, start[index])
        given = o[0, begin:end], final[index]
        torch.testing.assert_close(given, wanted, rtol=0.0, atol=1e-11)


def test_gradients_pass_from_segment_to_segment() -> None:
    q, k, v, state = (x.requires_grad_() for x in inputs(1, 9))
    retain, _ = layer(6.0)
    found = []
    for segment in (4, 2048):
        retain.segment = segment
        o, final = retain(q, k, v, log_decay(H), state=state, cu_seqlens=None, output_state=True)
        found.append(torch.autograd.grad(o.sin().sum() + final.sin().sum(), (q, k, v, state)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=1e-11)


@pytest.mark.parametrize(("base", "tokens"), [(512.0, 40_000), (3.0, 2000), (0.1, 40)])
def test_float32_does_not_overflow_far_out(base: float, tokens: int) -> None:
    """At base 512 a key near token 36 000 would be scaled beyond float32."""
    retain, gamma = layer(base)
    exact = inputs(1, tokens)[:3]
    o, final = retain(
        *(x.float() for x in exact), log_decay(H), state=None, cu_seqlens=None, output_state=True
    )
    assert o.isfinite().all()
    # γ of the slowest channel is (1 - 2^-6): what lies 4000 tokens back counts for nothing.
    tail = [x[0, -4000:] for x in exact]
    wanted, state = channel_by_channel(*tail, gamma, torch.zeros(H, K, V, dtype=torch.float64))
    for given, expected in ((o[0, -500:], wanted[-500:]), (final[0], state)):
        assert (given.double() - expected).norm() <= 1e-6 * expected.norm()
