"""The decode step in one launch or two against its parts in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from retentive.kernels.triton import decode
from retentive.kernels.triton.decode import decode_step
from retentive.layers.activations import ACTIVATIONS
from retentive.layers.rotation import Rotation, rotate
from retentive.ops import retention_step
from retentive.ops.decay import log_decay

# Relative L2 of y and of the state: sums of K float32 terms; or the rounding of y.
WITHIN = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
EPS = 1e-6


@pytest.fixture(params=["whole heads", "slices"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By the number of multiprocessors that the heads of the batch would have to fill."""
    count = 1 if request.param == "whole heads" else 1000
    monkeypatch.setattr(decode, "multiprocessors", lambda device: count)
    return request.param


class Slots:
    """Three slots, T new tokens each; `step` by the kernels, `exact` in float64."""

    def __init__(
        self, device: torch.device, K: int, V: int, T: int = 1, H: int = 2, key_heads: int = 2,
        dtype: torch.dtype = torch.float32, norm: str = "layernorm", act: str = "swish",
        gated: bool = True, affine: bool = False,
    ):  # fmt: skip
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        generator = torch.Generator().manual_seed(K + V + T)
        widths = (H * K, key_heads * K, key_heads * V, H * V)
        q, k, v, gate = random(3, T, sum(widths)).to(dtype).split(widths, -1)
        self.q, self.k = q.unflatten(-1, (H, K)), k.unflatten(-1, (key_heads, K))
        self.v = v.unflatten(-1, (key_heads, V))
        self.gate = gate if gated else None
        self.state = random(3, H, K, V)
        self.weight = random(V) + 1 if affine else None
        self.bias = random(V) if affine and norm == "layernorm" else None
        self.norm, self.act = norm, act
        self.log_decay = log_decay(H).to(device)
        self.rotation = Rotation(K, "official", 10000.0, K**-0.5, log_decay(H))
        positions = torch.tensor([7, 0, 10**6])[:, None] + torch.arange(T)
        self.positions = positions.to(device)

    @property
    def decay(self) -> Tensor:
        return self.log_decay.exp().float().unsqueeze(-1)

    def step(self, active: Tensor | None = None) -> Tensor:
        return decode_step(
            self.q, self.k, self.v, self.gate, self.state, self.decay,
            *self.rotation(self.positions, torch.float32), active,
            self.weight, self.bias, self.norm, self.act, EPS,
        )  # fmt: skip

    def exact(self, active: Tensor | None = None) -> tuple[Tensor, Tensor]:
        angles = self.rotation(self.positions, torch.float64)
        q = rotate(self.q.double(), angles.cos, angles.sin)
        k = rotate(self.k.double(), angles.key_cos, angles.key_sin)
        group = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(group, 2) for x in (k, self.v.double()))
        o, state = retention_step(q, k, v, self.log_decay, self.state.double(), active=active)
        weight, bias = (None if x is None else x.double() for x in (self.weight, self.bias))
        if self.norm == "layernorm":
            o = F.layer_norm(o, o.shape[-1:], weight, bias, EPS)
        elif self.norm == "rmsnorm":
            o = F.rms_norm(o, o.shape[-1:], weight, EPS)
        y = o.flatten(-2)
        return y if self.gate is None else ACTIVATIONS[self.act](self.gate.double()) * y, state


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("K, V", [(16, 32), (20, 36), (128, 16), (6, 10)])
def test_a_token(device, path, K, V):
    slots = Slots(device, K, V)
    y, state = slots.exact()
    assert error(slots.step(), y) < WITHIN[torch.float32]
    assert error(slots.state, state) < WITHIN[torch.float32]


def test_a_state_of_several_tiles(device, path, monkeypatch):
    monkeypatch.setattr(decode, "HEAD_TILE", 256)
    monkeypatch.setattr(decode, "SLICE_TILE", 256)
    slots = Slots(device, 40, 64)
    y, state = slots.exact()
    assert error(slots.step(), y) < WITHIN[torch.float32]
    assert error(slots.state, state) < WITHIN[torch.float32]


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "none"])
@pytest.mark.parametrize("gated, affine", [(True, True), (False, True), (False, False)])
def test_norms_and_gates(device, path, norm, gated, affine):
    slots = Slots(device, 16, 20, norm=norm, gated=gated, affine=affine and norm != "none")
    y, _ = slots.exact()
    assert error(slots.step(), y) < WITHIN[torch.float32]


def test_heads_that_share_a_key_head_and_another_activation(device, path):
    slots = Slots(device, 16, 20, T=2 if path == "slices" else 1, H=6, act="gelu_tanh")
    y, state = slots.exact()
    assert error(slots.step(), y) < WITHIN[torch.float32]
    assert error(slots.state, state) < WITHIN[torch.float32]


def test_a_decay_of_each_channel(device, path):
    """As xPos has it."""
    slots = Slots(device, 6, 10)
    before = slots.state.double()
    rates = torch.linspace(0.5, 1, 12, device=device).view(2, 6)
    tables = slots.rotation(slots.positions, torch.float32)
    tables = (*tables[:2], *(torch.zeros_like(table) for table in tables[2:]))  # no key is written
    decode_step(
        slots.q, slots.k, slots.v, None, slots.state, rates, *tables, None, None, None,
        "none", "swish", EPS,
    )  # fmt: skip
    assert error(slots.state, before * rates[:, :, None]) < WITHIN[torch.float32]


def test_bfloat16_projections_a_float32_state(device, path):
    slots = Slots(device, 32, 64, dtype=torch.bfloat16)
    y, state = slots.exact()
    result = slots.step()
    assert result.dtype == torch.bfloat16
    assert error(result, y) < WITHIN[torch.bfloat16]
    assert error(slots.state, state) < WITHIN[torch.float32]


@pytest.mark.parametrize("T", [2, 5])
def test_several_tokens_a_slot(device, T):
    slots = Slots(device, 20, 36, T=T)
    y, state = slots.exact()
    assert error(slots.step(), y) < WITHIN[torch.float32]
    assert error(slots.state, state) < WITHIN[torch.float32]


@pytest.mark.parametrize("T", [1, 3])
def test_a_slot_that_is_not_active_stays_as_it_is(device, path, T):
    """Whatever it holds."""
    active = torch.tensor([True, False, True], device=device)
    slots = Slots(device, 16, 32, T=T)
    y, state = slots.exact(active)
    for x in (slots.q, slots.k, slots.v, slots.gate):
        x[1] = float("nan")
    idle = slots.state[1].clone()
    result = slots.step(active)
    assert torch.equal(slots.state[1], idle)
    assert not result[1].any()
    assert error(result[::2], y[::2]) < WITHIN[torch.float32]
    assert error(slots.state, state) < WITHIN[torch.float32]


def test_is_a_sound_custom_op(device):
    slots = Slots(device, 8, 16)
    arguments = (
        slots.q, slots.k, slots.v, slots.gate, slots.state, slots.decay,
        *slots.rotation(slots.positions, torch.float32), None, None, None, "rmsnorm", "swish", EPS,
    )  # fmt: skip
    torch.library.opcheck(decode_step, arguments)
