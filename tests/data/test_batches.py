"""The batch order, on streams in which every text token occurs once, so that places can be told."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retentive.data.batches import NO_TARGET, Batch, BatchOrder
from retentive.data.dataset import Split
from retentive.errors import InputError

END = 0


def make_split(lengths: list[int]) -> Split:
    """Documents of an end token and `length` tokens 1, 2, 3, ... that go on through the split."""
    tokens, offsets = [], [0]
    word = 1
    for length in lengths:
        tokens += [END, *range(word, word + length)]
        word += length
        offsets.append(len(tokens))
    return Split(np.array(tokens, np.uint16), np.array(offsets, np.int64), num_bytes=0)


@st.composite
def orders(draw: st.DrawFn, carry: bool | None = None) -> BatchOrder:
    split = make_split(draw(st.lists(st.integers(0, 12), min_size=1, max_size=12)))
    batch_size = draw(st.integers(1, min(4, split.num_tokens)))
    seq_len = draw(st.integers(1, split.num_tokens // batch_size))
    seed = draw(st.integers(-3, 2**64))
    return BatchOrder(
        split, batch_size, seq_len, seed, carry=draw(st.booleans()) if carry is None else carry
    )


def pairs(batch: Batch) -> Counter[tuple[int, int]]:
    """How often each (token, target) occurs."""
    there = batch.targets != NO_TARGET
    return Counter(zip(batch.tokens[there].tolist(), batch.targets[there].tolist(), strict=True))


def epoch_of(split: Split) -> Counter[tuple[int, int]]:
    """What one epoch has to hold: tokens with their successors; every document ends in an end."""
    counts: Counter[tuple[int, int]] = Counter()
    for start, stop in pairwise(split.offsets):
        counts.update(pairwise([*split.tokens[start:stop].tolist(), END]))
    return counts


@given(orders(carry=False), st.integers(1, 3))
def test_every_token_of_an_epoch_is_seen_exactly_once(order: BatchOrder, epochs: int):
    """A batch may hold the end of an epoch and the next one's begin; B epochs are whole batches."""
    steps = round(order.steps_per_epoch * order.batch_size) * epochs
    seen = sum((pairs(order.batch(step)) for step in range(steps)), Counter())
    expected = epoch_of(order.split)
    assert seen == Counter({pair: n * epochs * order.batch_size for pair, n in expected.items()})


@given(orders(carry=True), st.integers(0, 3))
def test_lanes_see_every_token_of_an_epoch_exactly_once(order: BatchOrder, epoch: int):
    steps = int(order.steps_per_epoch)
    batches = (order.batch(step) for step in range(epoch * steps, (epoch + 1) * steps))
    assert sum(map(pairs, batches), Counter()) == epoch_of(order.split)


@given(orders(), st.integers(0, 20))
def test_a_sequence_begins_at_every_row_and_document_and_nowhere_else(order: BatchOrder, step: int):
    batch = order.batch(step)
    flat, targets = batch.tokens.flatten(), batch.targets.flatten()
    rows = range(0, flat.numel(), order.seq_len)
    documents = ((flat == END) & (targets != NO_TARGET)).nonzero().flatten().tolist()
    filled = (targets == NO_TARGET).tolist()
    fills = [i for i, (a, b) in enumerate(pairwise([False, *filled])) if b and not a]
    begins = sorted({*rows, *documents, *fills})
    assert batch.cu_seqlens.tolist() == [*begins, flat.numel()]
    assert batch.cu_seqlens.dtype == torch.int64


@given(orders(), st.integers(0, 20))
def test_within_a_sequence_the_target_is_the_next_token(order: BatchOrder, step: int):
    batch = order.batch(step)
    tokens, targets = batch.tokens.flatten().tolist(), batch.targets.flatten().tolist()
    for start, stop in pairwise(batch.cu_seqlens.tolist()):
        if targets[start] == NO_TARGET:
            assert set(targets[start:stop]) == {NO_TARGET}
            assert set(tokens[start:stop]) == {END}
        else:
            assert targets[start : stop - 1] == tokens[start + 1 : stop]


@given(orders(carry=True), st.integers(0, 20))
def test_lanes_go_on_where_they_ended(order: BatchOrder, step: int):
    before, after = order.batch(step), order.batch(step + 1)
    new_epoch = (step + 1) % int(order.steps_per_epoch) == 0
    for b in range(order.batch_size):
        if new_epoch or after.targets[b, 0] == NO_TARGET:
            assert not after.continues[b]
        else:
            assert before.targets[b, -1] == after.tokens[b, 0]
            assert after.continues[b] == (after.tokens[b, 0] != END)
    if step % int(order.steps_per_epoch) == 0:
        assert not before.continues.any()


@given(orders(), st.integers(0, 20))
def test_a_batch_depends_on_seed_and_step_only(order: BatchOrder, step: int):
    """Not on the steps that were asked for before, as in a run that resumes."""
    for earlier in range(step):
        order.batch(earlier)
    fresh = BatchOrder(
        order.split, order.batch_size, order.seq_len, order.seed, carry=order.carry
    ).batch(step)
    again = order.batch(step)
    for name in ("tokens", "targets", "cu_seqlens", "continues"):
        assert torch.equal(getattr(again, name), getattr(fresh, name))


def test_epochs_and_seeds_differ():
    split = make_split([5] * 40)

    def first_epochs(seed: int) -> list[list[int]]:
        order = BatchOrder(split, 4, 10, seed)
        return [order.batch(step).tokens.flatten().tolist() for step in (0, 6)]  # 6 steps an epoch

    a, b = first_epochs(1), first_epochs(2)
    assert len({tuple(tokens) for tokens in [*a, *b]}) == 4


def test_the_order_is_the_same_everywhere():
    """A run begun with one NumPy resumes with another: the order is pinned, not NumPy's choice."""
    order = BatchOrder(make_split([3, 1, 4, 1, 5]), 2, 4, seed=7)
    assert order.batch(0).tokens.tolist() == [[6, 7, 8, 0], [13, 14, 0, 4]]


def test_dtypes_and_shapes():
    batch = BatchOrder(make_split([9, 9]), 2, 3, seed=0).batch(0)
    assert batch.tokens.shape == batch.targets.shape == (2, 3)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.continues.tolist() == [False, False]


@pytest.mark.parametrize("carry", [False, True])
def test_a_corpus_too_small_for_one_batch(carry: bool):
    with pytest.raises(InputError, match="10 tokens, too few for one batch of 2 rows of 6"):
        BatchOrder(make_split([9]), 2, 6, seed=0, carry=carry)
    with pytest.raises(InputError, match="0 tokens"):
        BatchOrder(make_split([]), 1, 1, seed=0, carry=carry)


@pytest.mark.parametrize(("batch_size", "seq_len"), [(0, 4), (4, 0), (-1, 4)])
def test_a_batch_of_nothing(batch_size: int, seq_len: int):
    with pytest.raises(InputError, match="at least 1"):
        BatchOrder(make_split([9]), batch_size, seq_len, seed=0)
