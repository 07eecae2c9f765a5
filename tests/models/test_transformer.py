"""The baseline's attention against a plain one, and what its cache does when it is shared."""

import torch
from torch import Tensor

from retentive.mixers.kv_cache import KVCache

EXACT = {"rtol": 0.0, "atol": 1e-11}


def plain_attention(attention, x: Tensor) -> Tensor:
    """One row x `[T,D]`, head by head."""
    dim = attention.head_dim
    q, k, v = (p(x) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    q, k, v = (y.unflatten(-1, (-1, dim)) for y in (q, k, v))
    theta = 10000.0 ** -(2 * torch.arange(dim // 2, dtype=torch.float64) / dim)
    turn = torch.exp(1j * torch.arange(len(x))[:, None, None] * theta)
    q, k = (torch.complex(y[..., : dim // 2], y[..., dim // 2 :]) * turn for y in (q, k))
    group = q.shape[1] // k.shape[1]
    heads = []
    for head in range(q.shape[1]):
        scores = (q[:, head].conj() @ k[:, head // group].T).real * dim**-0.5
        later = torch.ones_like(scores).triu(1).bool()
        heads.append(scores.masked_fill(later, float("-inf")).softmax(-1) @ v[:, head // group])
    return attention.o_proj(torch.cat(heads, -1))


def test_attention_is_softmax_attention(transformer, tokens: Tensor) -> None:
    attention = transformer.layers[0].attention
    x = transformer.embed_tokens(tokens)
    y, _ = attention(x, None, transformer.layout(tokens))
    torch.testing.assert_close(y, torch.stack([plain_attention(attention, r) for r in x]), **EXACT)


def piece(value: float, rows: int = 2, tokens: int = 1) -> tuple[Tensor, Tensor]:
    return torch.full((rows, 1, tokens, 2), value), torch.full((rows, 1, tokens, 2), -value)


def held(cache: KVCache) -> list[list[float]]:
    return [cache.row(row)[0][0, 0, :, 0].tolist() for row in range(len(cache.lengths))]


@torch.no_grad()
def test_appending_is_in_place_while_there_is_room() -> None:
    cache = KVCache.empty(2, 4, 1, 2, torch.zeros(()))
    grown = cache.append(piece(1.0)).append(piece(2.0, tokens=2))
    assert grown.buffers is cache.buffers
    assert (cache.lengths, held(cache)) == ((0, 0), [[], []])
    assert held(grown) == [[1, 2, 2], [1, 2, 2]]


@torch.no_grad()
def test_growth_is_geometric() -> None:
    cache = KVCache.empty(1, 0, 1, 2, torch.zeros(()))
    moves, capacities = 0, set()
    for step in range(100):
        before = cache.buffers
        cache = cache.append(piece(step, rows=1))
        moves += cache.buffers is not before
        capacities.add(cache.buffers.capacity)
    assert moves <= 9
    assert max(capacities) < 200
    assert held(cache) == [list(range(100))]


def test_appending_leaves_a_graph_what_it_holds() -> None:
    cache, queries = KVCache.empty(1, 4, 1, 2, torch.zeros(())), torch.ones(2, requires_grad=True)
    total = torch.zeros(())
    for value in (1.0, 2.0):  # keys of frozen weights, of which no gradient is wanted
        cache = cache.append(piece(value, rows=1))
        total = total + (cache.kv[0] * queries).sum()
    total.backward()
    assert queries.grad is not None and queries.grad.tolist() == [4.0, 4.0]


@torch.no_grad()
def test_branches_do_not_see_each_other() -> None:
    trunk = KVCache.empty(2, 8, 1, 2, torch.zeros(())).append(piece(1.0))
    one, two = trunk.append(piece(2.0)), trunk.append(piece(3.0))
    one_more, three = one.append(piece(4.0)), trunk.append(piece(5.0))
    assert held(trunk) == [[1], [1]]
    assert held(one) == [[1, 2], [1, 2]]
    assert held(two) == [[1, 3], [1, 3]]
    assert held(one_more) == [[1, 2, 4], [1, 2, 4]]
    assert held(three) == [[1, 5], [1, 5]]
    assert one_more.row(0)[1].flatten().tolist() == [-1, -1, -2, -2, -4, -4]


def test_rows_of_other_lengths() -> None:
    cache = KVCache.empty(2, 8, 1, 2, torch.zeros(())).append(piece(1.0))
    ragged = cache.emptied(torch.tensor([True, False])).append(piece(2.0, tokens=2))
    assert held(ragged) == [[2, 2], [1, 2, 2]]
    assert held(ragged.select(torch.tensor([1, 0, 1]))) == [[1, 2, 2], [2, 2], [1, 2, 2]]
    together = KVCache.concat([ragged, cache])
    assert held(together) == [[2, 2], [1, 2, 2], [1], [1]]
    assert held(together.append(piece(7.0, rows=4)))[2] == [1, 7]
    assert held(ragged) == [[2, 2], [1, 2, 2]]


def test_selected_rows_share_nothing() -> None:
    cache = KVCache.empty(2, 1, 1, 2, torch.zeros(())).append(piece(1.0))
    cache.select(torch.tensor([0, 1])).buffers.kv[0].fill_(9)
    assert held(cache) == [[1], [1]]


def test_recorded_caches_are_never_written(make_model, tokens: Tensor) -> None:
    """A cache that autograd holds for the backward must not be appended to in place."""
    model = make_model("transformer")
    logits, state = model(tokens, model.init_state(3, capacity=64))
    with torch.no_grad():
        model(tokens, state)
    logits.sum().backward()
