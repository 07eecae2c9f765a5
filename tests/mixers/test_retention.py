"""`MultiScaleRetention` against the formulas of the paper, written out without any tricks."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from retentive.devices import available_devices
from retentive.errors import InputError
from retentive.layers.rotation import Rotation, rotate
from retentive.mixers.retention import MultiScaleRetention
from retentive.ops.decay import log_decay

EXACT = {"rtol": 0.0, "atol": 1e-11}


def exponents(rule: str, heads: int, pairs: int) -> Tensor:
    """e of θ = base^(-e), `[heads,pairs]`."""
    p = torch.arange(pairs, dtype=torch.float64)
    if rule == "rope-across-heads":
        return torch.stack([(head * pairs + p) / (heads * pairs) for head in range(heads)])
    return (p / pairs if rule == "rope" else p / (pairs - 1)).expand(heads, pairs)


def by_the_paper(layer: MultiScaleRetention, x: Tensor, heads: int, options: dict) -> Tensor:
    """One row x `[T,D]`. Pairs are complex numbers that turn by e^{inθ}, as the paper has them."""
    groups = options.get("num_kv_heads", heads)
    q = layer.q_proj(x).unflatten(-1, (heads, -1))
    k, v = (p(x).unflatten(-1, (groups, -1)) for p in (layer.k_proj, layer.v_proj))
    k, v = (torch.stack([y[:, h * groups // heads] for h in range(heads)], 1) for y in (k, v))
    K = q.shape[-1]
    half, pairs = K // 2, options.get("rotary_dim", K) // 2
    e = exponents(options.get("rotation", "official"), heads, pairs)
    theta = torch.zeros(heads, half, dtype=torch.float64)
    theta[:, :pairs] = options.get("rotation_base", 10000.0) ** -e
    n = torch.arange(len(x))[:, None, None]
    turn = torch.exp(1j * n * theta)
    q, k = (torch.complex(y[..., :half], y[..., half:]) * turn for y in (q, k))
    if "xpos_base" in options:
        zeta = ((e + 0.4) / 1.4) ** (n / options["xpos_base"])
        q[..., :pairs] *= zeta
        k[..., :pairs] /= zeta
    gamma = torch.exp(log_decay(heads, options.get("decay", "power")))
    y = torch.zeros(len(x), heads, v.shape[-1], dtype=v.dtype)
    for n in range(len(x)):
        powers = gamma[None] ** (n - torch.arange(n + 1))[:, None]
        scores = (q[n].conj() * k[: n + 1]).sum(-1).real * K**-0.5 * powers
        if options.get("row_scale"):
            scores = scores / powers.sum(0).sqrt()
        y[n] = torch.einsum("mh,mhv->hv", scores, v[: n + 1])
    if options.get("head_norm") == "rmsnorm":
        y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    elif options.get("head_norm") != "none":  # GroupNorm with one group a head
        y = F.group_norm(y.flatten(1), heads, eps=1e-6).view_as(y)
    if options.get("head_norm_affine"):
        y = y * layer.head_norm.weight
        if options.get("head_norm") != "rmsnorm":
            y = y + layer.head_norm.bias
    if layer.g_proj is None:
        return layer.o_proj(y.flatten(1))
    gate = layer.g_proj(x)
    if options.get("gate_act") == "gelu":
        return layer.o_proj(gate * (1 + torch.erf(gate / 2**0.5)) / 2 * y.flatten(1))
    return layer.o_proj(gate * torch.sigmoid(gate) * y.flatten(1))


OPTIONS = [
    {},
    {"rotation": "rope", "rotation_base": 500.0},
    {"decay": "linspace", "row_scale": True},
    {"decay": (0.0, -0.5), "row_scale": True, "head_norm": "rmsnorm"},
    {"qk_dim": 8, "value_dim": 40},
    {"gate": False},
    {"head_norm": "none"},
    {"gate": False, "head_norm": "none", "decay": (0.0, 0.0), "row_scale": True},
    {"num_kv_heads": 1},
    {"rotary_dim": 4},
    {"rotary_dim": 8, "rotation": "rope", "row_scale": True, "num_kv_heads": 1},
    {"rotation": "rope-across-heads"},
    {"rotation": "rope-across-heads", "xpos_base": 4.0, "qk_dim": 16},
    {"rotary_dim": 6, "xpos_base": 4.0, "row_scale": True, "num_kv_heads": 1},
    {"gate_act": "gelu", "qkv_bias": True},
    {"gate_bias": True, "out_bias": True, "head_norm_affine": True},
    {"head_norm_affine": True, "head_norm": "rmsnorm"},
]


def make_layer(options: dict) -> MultiScaleRetention:
    torch.manual_seed(0)
    layer = MultiScaleRetention(24, 2, **options)
    for name, weight in layer.named_parameters():
        if weight.ndim == 1:  # of a norm, or a bias
            torch.nn.init.normal_(weight, float("weight" in name), 0.3)
    return layer.double()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_is_the_paper(options: dict) -> None:
    layer = make_layer(options)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    y, _ = layer(x)
    wanted = torch.stack([by_the_paper(layer, row, 2, options) for row in x])
    torch.testing.assert_close(y, wanted, **EXACT)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_alone_it_goes_on_from_a_state(options: dict) -> None:
    layer = make_layer(options)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    whole, wanted = layer(x)
    _, state = layer(x[:, :4])
    y, state = layer(x[:, 4:], state, torch.arange(4, 9).expand(2, 5))
    torch.testing.assert_close(y, whole[:, 4:], **EXACT)
    torch.testing.assert_close(state, wanted, **EXACT)


def test_only_distances_count() -> None:
    layer = make_layer({})
    x = torch.randn(1, 9, 24, dtype=torch.float64)
    far, _ = layer(x, positions=torch.arange(10**6, 10**6 + 9)[None])
    torch.testing.assert_close(far, layer(x)[0], rtol=0.0, atol=1e-8)


def test_interleaved_pairs_are_rows_in_another_order() -> None:
    """What `RetNetConfig` promises for checkpoints that pair dims 2p and 2p + 1."""
    K, heads = 12, 2
    interleaved = make_layer({})  # as if its rows were meant in the other order
    layer = make_layer({})
    order = torch.cat((torch.arange(0, K, 2), torch.arange(1, K, 2)))
    rows = torch.cat([head * K + order for head in range(heads)])
    with torch.no_grad():
        layer.q_proj.weight.copy_(interleaved.q_proj.weight[rows])
        layer.k_proj.weight.copy_(interleaved.k_proj.weight[rows])
    x = torch.randn(1, 7, 24, dtype=torch.float64)
    q, k = (p(x[0]).view(7, heads, K // 2, 2) for p in (interleaved.q_proj, interleaved.k_proj))
    theta = 10000 ** -(torch.arange(K // 2, dtype=torch.float64) / (K // 2 - 1))
    turn = torch.exp(1j * torch.arange(7)[:, None, None] * theta)
    q, k = (torch.view_as_complex(y) * turn for y in (q, k))
    scores = torch.einsum("nhp,mhp->hnm", q.conj(), k).real
    halves = layer.q_proj(x[0]).view(7, heads, K), layer.k_proj(x[0]).view(7, heads, K)
    q, k = (torch.complex(y[..., : K // 2], y[..., K // 2 :]) * turn for y in halves)
    torch.testing.assert_close(torch.einsum("nhp,mhp->hnm", q.conj(), k).real, scores, **EXACT)
    torch.testing.assert_close(layer(x)[0][0], by_the_paper(layer, x[0], heads, {}), **EXACT)


@pytest.mark.parametrize("rule", ["official", "rope"])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_angles_are_exact_far_out(rule: str, head_dim: int) -> None:
    pairs = head_dim // 2
    angles = Rotation(head_dim, rule, 10000.0)(torch.tensor([[10**6]]), torch.float32)
    for p in range(pairs):
        theta = 10000.0 ** -(p / (pairs - 1) if rule == "official" else p / pairs)
        turn = math.fmod(1e6 * theta, 2 * math.pi)
        given = math.atan2(angles.sin[0, 0, 0, pairs + p].double(), angles.cos[0, 0, 0, p].double())
        error = math.remainder(given - turn, 2 * math.pi)
        assert abs(error) <= 1e-6
        assert angles.sin[0, 0, 0, p] == -angles.sin[0, 0, 0, pairs + p]


def test_lower_precision_leaves_decay_and_angles_alone() -> None:
    layer = MultiScaleRetention(32, 4, row_scale=True)
    positions = torch.tensor([[0, 5, 10**6]])
    before = layer.rotation(positions, torch.float32)
    decay, frequencies = layer.log_decay.value.clone(), layer.rotation.frequencies.value.clone()
    for change in (
        lambda: layer.to(torch.bfloat16),
        lambda: layer.half(),
        lambda: layer.float(),
        lambda: layer.load_state_dict(MultiScaleRetention(32, 4, decay="linspace").state_dict()),
    ):
        change()
        assert layer.log_decay.value.dtype == torch.float64
        assert torch.equal(layer.log_decay.value, decay)
        assert torch.equal(layer.rotation.frequencies.value, frequencies)
        for one, other in zip(layer.rotation(positions, torch.float32), before, strict=True):
            assert torch.equal(one, other)
    assert sorted(layer.state_dict()) == [f"{x}_proj.weight" for x in "gkoqv"]


def test_from_the_meta_device_constants_come_whole() -> None:
    with torch.device("meta"):
        layer = MultiScaleRetention(32, 4, decay="linspace", row_scale=True)
    assert layer.q_proj.weight.is_meta
    layer.to_empty(device="cpu")
    other = MultiScaleRetention(32, 4, decay="linspace", row_scale=True)
    assert torch.equal(layer.log_decay.value, other.log_decay.value)
    positions = torch.arange(3)[None]
    for x, y in zip(
        layer.rotation(positions, torch.float32),
        other.rotation(positions, torch.float32),
        strict=True,
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize("device", available_devices())
def test_constants_are_where_the_parameters_are(device: str) -> None:
    """However a layer comes to its device; but a device without float64 has none of them."""
    with torch.device(device):
        built = MultiScaleRetention(32, 4)
    for layer in (built, built.to(torch.bfloat16), MultiScaleRetention(32, 4).to(device)):
        assert layer.q_proj.weight.device.type == device
        for constant in (layer.log_decay, layer.rotation.frequencies):
            assert constant.value.device.type == ("cpu" if device == "mps" else device)
            assert constant.value.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_stay_in_float32(dtype: torch.dtype) -> None:
    layer = MultiScaleRetention(32, 4).to(dtype)
    x = torch.randn(1, 5, 32, dtype=dtype)
    y, state = layer(x)
    assert y.dtype == dtype
    assert state.dtype == torch.float32


def test_partial_rotation_is_that_of_other_code_in_another_order() -> None:
    """What `RetNetConfig` promises for checkpoints whose first rotary_dim dims of a head turn."""
    K, R = 12, 8
    layer = make_layer({"rotary_dim": R, "rotation": "rope"})
    other = make_layer({"rotary_dim": R, "rotation": "rope"})  # as if in the order of other code
    order = torch.tensor([0, 1, 2, 3, 8, 9, 4, 5, 6, 7, 10, 11])
    rows = torch.cat((order, K + order))
    with torch.no_grad():
        layer.q_proj.weight.copy_(other.q_proj.weight[rows])
        layer.k_proj.weight.copy_(other.k_proj.weight[rows])
    x = torch.randn(1, 7, 24, dtype=torch.float64)
    theta = 10000.0 ** -(torch.arange(R // 2, dtype=torch.float64) / (R // 2))
    angle = torch.arange(7)[:, None, None] * theta
    scores = []
    for given in (layer, other):
        q, k = (p(x[0]).view(7, 2, K) for p in (given.q_proj, given.k_proj))
        if given is other:
            a, b, still = q.split([R // 2, R // 2, K - R], -1)
            q = torch.cat(
                (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), still), -1
            )
            a, b, still = k.split([R // 2, R // 2, K - R], -1)
            k = torch.cat(
                (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), still), -1
            )
        else:
            angles = given.rotation(torch.arange(7)[None], torch.float64)
            q = rotate(q[None], angles.cos, angles.sin)[0]
            k = rotate(k[None], angles.cos, angles.sin)[0]
        scores.append(torch.einsum("nhk,mhk->hnm", q, k))
    torch.testing.assert_close(*scores, **EXACT)


def test_learns_in_another_model() -> None:
    """A regression on a series, without tokens: gradients arrive, the loss falls."""
    torch.manual_seed(0)
    layer = MultiScaleRetention(16, 2)
    series = torch.sin(torch.arange(40) * 0.3)[None, :, None].expand(1, 40, 16).contiguous()
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        y, _ = layer(series[:, :-1])
        loss = F.mse_loss(y, series[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MultiScaleRetention(30, 4), ["qk_dim 30", "num_heads 4"]),
        (lambda: MultiScaleRetention(12, 4), ["odd", "3"]),
        (lambda: MultiScaleRetention(16, 2, head_nrm="none"), ["'head_nrm'", "did you mean"]),
        (lambda: MultiScaleRetention(16, 2, norm="rmsnorm"), ["'norm'", "head_norm"]),
        (lambda: MultiScaleRetention(16, 2, head_norm="groupnorm"), ["'groupnorm'", "layernorm"]),
        (lambda: MultiScaleRetention(16, 2, head_norm="non"), ["'non'", "did you mean 'none'"]),
        (lambda: MultiScaleRetention(16, 2, gate=None), ["gate", "None", "true or false"]),
        (lambda: MultiScaleRetention(16, 2, decay="powers"), ["'powers'", "'power'"]),
        (lambda: MultiScaleRetention(16, 2, row_scale="no"), ["row_scale", "'no'"]),
        (lambda: MultiScaleRetention(16, 2)(torch.zeros(2, 0, 16)), ["[2, 0, 16]", "[B,T,16]"]),
        (lambda: MultiScaleRetention(16, 2)(torch.zeros(2, 16)), ["[2, 16]", "[B,T,16]"]),
        (lambda: MultiScaleRetention(16, 2)(torch.zeros(2, 3, 8)), ["[2, 3, 8]", "[B,T,16]"]),
    ],
)
def test_refuses_wrong_sizes(call, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), caught.value


def test_refuses_a_state_without_its_place() -> None:
    layer = MultiScaleRetention(16, 2)
    x = torch.randn(2, 3, 16)
    _, state = layer(x)
    with pytest.raises(InputError, match="without positions"):
        layer(x, state)
    with pytest.raises(InputError, match=r"\[2, 4\]"):
        layer(x, state, torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(InputError, match=r"\[3, 3\].*give int64 \[2, 3\]"):
        layer(x, state, torch.zeros(3, 3, dtype=torch.int64))
    with pytest.raises(InputError, match="float32"):
        layer(x, state, torch.zeros(2, 3))


def test_without_a_gate_there_are_no_weights_of_one() -> None:
    layer = MultiScaleRetention(16, 2, gate=False)
    assert layer.g_proj is None
    assert sorted(layer.state_dict()) == [f"{x}_proj.weight" for x in "koqv"]


def test_alone_its_weights_are_the_authors() -> None:
    torch.manual_seed(0)
    layer = MultiScaleRetention(128, 2)
    assert layer.q_proj.weight.std().item() == pytest.approx(2**-2.5 * 128**-0.5, rel=0.05)
    assert layer.o_proj.weight.std().item() == pytest.approx(2**-1 * 192**-0.5, rel=0.05)
