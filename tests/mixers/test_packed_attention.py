"""Attention within packed sequences: each as if alone, in as few calls as there are lengths."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from retentive.mixers import attention
from retentive.mixers.attention import CausalMask, SlidingWindow, attend_packed

EXACT = {"rtol": 0.0, "atol": 1e-12}
MASKS = {"causal": CausalMask(), "window": SlidingWindow(3)}
LENGTHS = {
    "equal": [5, 5, 5],
    "one": [15],
    "ragged": [4, 1, 7, 3],
    "runs": [3, 3, 1, 1, 1, 6],
    "empty": [0, 5, 0, 5, 5, 0],
}


def qkv(total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Four heads of queries, two of keys and values."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(1, heads, total, 8, dtype=torch.float64, generator=generator).requires_grad_()
        for heads in (4, 2, 2)
    )


def bounds_of(lengths: Sequence[int]) -> Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0))


def one_by_one(mask: Any, q: Tensor, kv: tuple[Tensor, Tensor], lengths: Sequence[int]) -> Tensor:
    pieces = zip(*(x.split(lengths, 2) for x in (q, *kv)), strict=True)
    return torch.cat([mask.attend(q, (k, v)) for q, k, v in pieces if q.shape[2]], 2)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the queries of each call of `F.scaled_dot_product_attention`."""
    seen, call = [], F.scaled_dot_product_attention

    def counted(q: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.append(q.shape)
        return call(q, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    return seen


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", LENGTHS)
def test_each_sequence_is_as_if_alone(mask: str, name: str) -> None:
    lengths = LENGTHS[name]
    q, k, v = qkv(sum(lengths))
    given = attend_packed(MASKS[mask], q, (k, v), bounds_of(lengths))
    wanted = one_by_one(MASKS[mask], q, (k, v), lengths)
    torch.testing.assert_close(given, wanted, **EXACT)
    upstream = torch.randn_like(wanted)
    gradients = (torch.autograd.grad(o, (q, k, v), upstream) for o in (given, wanted))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("mask", MASKS)
def test_equal_sequences_are_one_batch(mask: str, calls: list[torch.Size]) -> None:
    q, k, v = qkv(40)
    attend_packed(MASKS[mask], q, (k, v), bounds_of([5] * 8))
    assert calls == [(8, 4, 5, 8)]


def test_a_run_of_equal_sequences_is_one_batch(calls: list[torch.Size]) -> None:
    q, k, v = qkv(15)
    attend_packed(CausalMask(), q, (k, v), bounds_of([5, 5, 2, 0, 3]))
    assert [shape[0] for shape in calls] == [2, 1, 1]


@pytest.mark.parametrize("name", ["transformer", "transformer-gqa", "hybrid"])
def test_equal_rows_cost_a_call_for_each_layer(
    make_model: Callable, tokens: Tensor, name: str, calls: list[torch.Size]
) -> None:
    model = make_model(name)
    rows, length = tokens.shape
    layout = model.packed_layout(torch.arange(0, rows * length + 1, length))
    hidden, _ = model.hidden(tokens.view(1, -1), layout=layout)
    attending = sum("attention.q_proj.weight" in key for key in model.state_dict())
    assert [shape[0] for shape in calls] == [rows] * attending
    alone, _ = model.hidden(tokens)
    torch.testing.assert_close(hidden.view_as(alone), alone, **EXACT)


def test_a_cache_enters_the_first_sequence_of_its_row_only(
    make_model: Callable, tokens: Tensor, calls: list[torch.Size]
) -> None:
    model = make_model("transformer")
    _, before = model(tokens[:2, :3])
    calls.clear()
    layout = model.packed_layout(torch.tensor([0, 2, 4, 6, 8, 10, 12]), rows=2, state=before)
    hidden, after = model.hidden(tokens[:2, 3:9].reshape(1, -1), before, layout=layout)
    # row 0: a sequence that goes on, two new ones; row 1 the same
    assert [shape[0] for shape in calls] == [1, 2, 1, 2] * model.config.num_hidden_layers
    alone = [model.hidden(tokens[:2, 3:5], before)[0]]
    alone += [model.hidden(tokens[:2, at : at + 2])[0] for at in (5, 7)]
    torch.testing.assert_close(hidden.view(2, 6, -1), torch.cat(alone, 1), **EXACT)
    assert [layer.lengths for layer in after.layers] == [(2, 2)] * 2


class Varlen:
    """Stands in for torch's kernel: the same arguments, its definition in plain arithmetic."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor,
        max_q: int, max_k: int, *, window_size: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert torch.equal(cu_seq_q, cu_seq_k)
        assert max_q == max_k == int(cu_seq_q.diff().max())
        assert q.shape == k.shape == v.shape
        self.window_size = window_size
        back, ahead = (len(q) if side < 0 else side for side in window_size)
        at = torch.arange(len(q))
        sequence = torch.searchsorted(cu_seq_q, at, right=True)
        distance = at[:, None] - at
        seen = (distance <= back) & (distance >= -ahead) & (sequence[:, None] == sequence)
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["ragged", "empty"])
def test_where_torch_has_a_kernel_for_different_lengths_it_is_one_call(
    mask: str, name: str, monkeypatch: pytest.MonkeyPatch, calls: list[torch.Size]
) -> None:
    kernel = Varlen()
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    monkeypatch.setattr(attention, "_has_varlen", lambda q, kv: True)
    lengths = LENGTHS[name]
    q, k, v = qkv(sum(lengths))
    given = attend_packed(MASKS[mask], q, (k, v), bounds_of(lengths))
    assert not calls
    assert kernel.window_size == {"causal": (-1, 0), "window": (2, 0)}[mask]
    torch.testing.assert_close(given, one_by_one(MASKS[mask], q, (k, v), lengths), **EXACT)


def test_equal_lengths_need_no_kernel_for_different_ones(
    monkeypatch: pytest.MonkeyPatch, calls: list[torch.Size]
) -> None:
    monkeypatch.setattr(attention, "_has_varlen", lambda q, kv: True)
    q, k, v = qkv(15)
    attend_packed(CausalMask(), q, (k, v), bounds_of([5, 5, 5]))
    assert calls == [(3, 4, 5, 8)]


def test_on_a_cpu_there_is_no_kernel_for_different_lengths() -> None:
    q, k, v = (x.bfloat16() for x in qkv(15))
    assert not attention._has_varlen(q, (k, v))
