"""Attention that sees a window, and its state, which holds no more: what a mask would give."""

import pytest
import torch
import zoo
from torch import Tensor
from torch.nn import functional as F

from retentive.mixers.attention import QUERIES_AT_ONCE, attend_window
from retentive.mixers.window import WindowCache
from retentive.models.retnet import RetNet

EXACT = {"rtol": 0.0, "atol": 1e-11}


def qkv(tokens: int, rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.manual_seed(0)
    q = torch.randn(rows, 4, tokens, 6, dtype=torch.float64, generator=generator)
    k, v = torch.randn(2, rows, 2, tokens, 6, dtype=torch.float64, generator=generator)
    return q, k, v


def masked(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    n = torch.arange(k.shape[2])
    distance = n[-q.shape[2] :, None] - n
    return F.scaled_dot_product_attention(
        q, k, v, (distance >= 0) & (distance < window), enable_gqa=True
    )


@pytest.mark.parametrize("window", [1, 3, 20, 100])
@pytest.mark.parametrize("queries", [1, 5, 20])
def test_a_query_sees_its_window(window: int, queries: int) -> None:
    q, k, v = qkv(20)
    q = q[:, :, -queries:]
    given = attend_window(q, (k, v), window)
    torch.testing.assert_close(given, masked(q, k, v, window), **EXACT)


def test_many_queries_are_taken_some_at_a_time() -> None:
    q, k, v = qkv(2 * QUERIES_AT_ONCE + 70, rows=1)
    torch.testing.assert_close(attend_window(q, (k, v), 30), masked(q, k, v, 30), **EXACT)


def test_rows_that_have_read_less() -> None:
    q, k, v = qkv(9)
    q = q[:, :, -3:]
    given = attend_window(q, (k, v), 8, lengths=[9, 4])
    torch.testing.assert_close(given[:1], masked(q[:1], k[:1], v[:1], 8), **EXACT)
    own = (q[1:], k[1:, :, -4:], v[1:, :, -4:])
    torch.testing.assert_close(given[1:], masked(*own, 8), **EXACT)


def piece(value: float, rows: int = 2, tokens: int = 1) -> tuple[Tensor, Tensor]:
    return torch.full((rows, 1, tokens, 2), value), torch.full((rows, 1, tokens, 2), -value)


def held(cache: WindowCache) -> list[list[float]]:
    return [cache.row(row)[0][0, 0, :, 0].tolist() for row in range(len(cache.lengths))]


def test_it_holds_the_last_tokens_and_frees_the_others() -> None:
    k, v = (
        torch.arange(1000.0).view(1, 1, 1000, 1).expand(2, 1, 1000, 2),
        torch.zeros(2, 1, 1000, 2),
    )
    cache = WindowCache.from_kv((k, v), [1000, 1000], room=3)
    assert held(cache) == [[997, 998, 999]] * 2
    assert cache.nbytes == sum(x.untyped_storage().nbytes() for x in cache.kv) == 2 * 2 * 3 * 2 * 4
    nothing = WindowCache.from_kv((k, v), [1000, 1000], room=0)
    assert (held(nothing), nothing.nbytes) == ([[], []], 0)


def test_rows_of_other_lengths() -> None:
    cache = WindowCache.from_kv(piece(1.0, tokens=2), [2, 2], room=3)
    ragged = cache.emptied(torch.tensor([True, False])).append_packed(
        piece(2.0, rows=1, tokens=3), [(0, 1), (1, 3)], 3
    )
    assert held(ragged) == [[2], [1, 2, 2]]
    assert held(cache) == [[1, 1], [1, 1]]
    assert held(ragged.select(torch.tensor([1, 0, 1]))) == [[1, 2, 2], [2], [1, 2, 2]]
    assert held(WindowCache.concat([ragged, cache])) == [[2], [1, 2, 2], [1, 1], [1, 1]]


@torch.no_grad()
def test_memory_of_a_hybrid_does_not_grow() -> None:
    config = zoo.retnet(
        vocab_size=13,
        hidden_size=8,
        num_hidden_layers=2,
        num_heads=2,
        attention_layers=(0,),
        attention={"num_heads": 2, "window": 5},
    )
    model, state, sizes = RetNet(config), None, []
    for length in (3, 20, 1, 1, 50):
        _, state = model(torch.zeros(2, length, dtype=torch.int64), state)
        sizes.append(state.nbytes)
    assert sizes[0] < sizes[1] == sizes[2] == sizes[3] == sizes[4]
    signature = [layer.signature for layer in state.layers]
    assert signature == [("window", 2, 4), ("retention", ("S", 2, 4, 8))]
