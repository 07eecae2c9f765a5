"""The residual wirings of a block, the FFN, and what is before and after all blocks."""

import pytest
import torch
import zoo
from torch import Tensor
from torch.nn import functional as F

from retentive.layers.activations import ACTIVATIONS
from retentive.layers.feed_forward import FeedForward
from retentive.models.block import RESIDUALS
from retentive.models.retnet import RetNet

EXACT = {"rtol": 0.0, "atol": 1e-11}
SMALL = {"vocab_size": 13, "hidden_size": 8, "num_hidden_layers": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("pre-norm", lambda x, f, n, g, m: (y := 3 * x + f(n(x))) * 3 + g(m(y))),
        ("post-norm", lambda x, f, n, g, m: m(3 * (y := n(3 * x + f(x))) + g(y))),
        ("output-norm", lambda x, f, n, g, m: 3 * (y := 3 * x + n(f(x))) + m(g(y))),
        ("parallel", lambda x, f, n, g, m: 3 * x + f(n(x)) + g(m(x))),
        ("mixer-only", lambda x, f, n, g, m: 3 * x + f(n(x))),
    ],
)
def test_the_residual_wiring_is_what_its_name_says(kind, wanted) -> None:
    torch.manual_seed(0)
    f, n, g, m = (torch.nn.Linear(8, 8).double() for _ in range(4))
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    residual = RESIDUALS[kind](zoo.retnet(**SMALL, residual_scale=3.0))
    y, kept = residual(x, lambda h: (f(h), "kept"), n, g, m)
    torch.testing.assert_close(y, wanted(x, f, n, g, m), **EXACT)
    assert kept == "kept"


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("subln", ["none", "layernorm", "rmsnorm"])
def test_feed_forward(act: str, gated: bool, subln: str) -> None:
    torch.manual_seed(0)
    config = zoo.retnet(
        **SMALL, hidden_act=act, gated_ffn=gated, ffn_subln=subln, ffn_bias=True, norm_eps=0.1
    )
    ffn = FeedForward(8, config.ffn, config.norm_eps).double()
    for name, weight in ffn.named_parameters():
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, float("weight" in name), 0.3)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    up, gate = ffn.up_proj(x), None if ffn.gate_proj is None else ffn.gate_proj(x)
    f = {
        "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
        "gelu_tanh": lambda z: (
            z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))) / 2
        ),
        "quick_gelu": lambda z: z / (1 + torch.exp(-1.702 * z)),
        "relu": lambda z: z.clamp(min=0),
        "relu2": lambda z: z.clamp(min=0) ** 2,
        "swish": lambda z: z * torch.sigmoid(z),
    }[act]
    inner = f(up) if gate is None else f(gate) * up
    if subln != "none":
        centred = inner - inner.mean(-1, keepdim=True) if subln == "layernorm" else inner
        inner = centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt() * ffn.subln.weight
        inner = inner + ffn.subln.bias if subln == "layernorm" else inner
    wanted = F.linear(inner, ffn.down_proj.weight, ffn.down_proj.bias)
    torch.testing.assert_close(ffn(x), wanted, **EXACT)


def model(**fields: object) -> RetNet:
    made = RetNet(zoo.retnet(**SMALL, **fields))
    made.init_weights(seed=0)
    return made.double().eval()


@pytest.fixture
def tokens() -> Tensor:
    return torch.arange(6)[None]


def test_embeddings_are_scaled_then_normed(tokens: Tensor) -> None:
    given = model(embed_scale=3.0, embed_norm=True, norm="rmsnorm", norm_eps=0.5)
    torch.nn.init.normal_(given.embed_norm.weight)
    x = 3 * given.embed_tokens(tokens)
    x = x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt() * given.embed_norm.weight
    torch.testing.assert_close(given.embed(tokens), x, **EXACT)
    torch.testing.assert_close(given.embed(given.embed_tokens(tokens)), x, **EXACT)


def test_without_a_final_norm_the_head_reads_the_stream(tokens: Tensor) -> None:
    given, normed = model(final_norm=False), model()
    given.load_state_dict(normed.state_dict(), strict=False)
    stream, _ = given.hidden(tokens)
    torch.testing.assert_close(normed.hidden(tokens)[0], normed.norm(stream), **EXACT)
    assert not any(key.startswith("norm.") for key in given.state_dict())


def test_the_head_has_its_bias_in_logits_and_loss(tokens: Tensor) -> None:
    given = model(head_bias=True)
    torch.nn.init.normal_(given.lm_head.bias)
    h, _ = given.hidden(tokens)
    logits = h @ given.lm_head.weight.T + given.lm_head.bias
    torch.testing.assert_close(given.head(h), logits, **EXACT)
    targets = tokens.roll(-1, 1)
    loss = F.cross_entropy(logits[0], targets[0])
    torch.testing.assert_close(given.loss(h, targets), loss, **EXACT)
    for one, other in zip(
        torch.autograd.grad(given.loss(h, targets), list(given.parameters()), retain_graph=True),
        torch.autograd.grad(loss, list(given.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(one, other, **EXACT)


def test_only_the_bias_of_the_head_may_be_trained(tokens: Tensor) -> None:
    given = model(head_bias=True).requires_grad_(False)
    given.lm_head.bias.requires_grad_()
    targets = tokens.roll(-1, 1).clone()
    targets[0, 2] = -100
    h, _ = given.hidden(tokens)
    (mine,) = torch.autograd.grad(given.loss(h, targets), [given.lm_head.bias])
    plain = F.cross_entropy(given.head(h)[0], targets[0])
    torch.testing.assert_close(mine, *torch.autograd.grad(plain, [given.lm_head.bias]), **EXACT)
