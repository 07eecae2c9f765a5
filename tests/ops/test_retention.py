"""Every form and backend against the float64 reference: values, states, gradients, splits, packing.

Tolerances (relative L2 against float64) are the errors of plain arithmetic in that precision over
thousands of terms: 2e-6 / 5e-6 for float32, 6e-3 / 1.2e-2 for bfloat16 (outputs / gradients).
"""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retentive.ops import FORMS, reference, retention, retention_step
from retentive.ops.chunkwise import _new_kept, _segments, chunkwise, default_chunk_size
from retentive.ops.decay import log_decay

TOLERANCE = {  # dtype: (outputs and states, gradients)
    torch.float64: (1e-13, 1e-13),
    torch.float32: (2e-6, 5e-6),
    torch.bfloat16: (6e-3, 1.2e-2),
    torch.float16: (1e-3, 2e-3),
}
NO_DECAY = [0.0, -0.3, -1e-9]


def relative_error(x, exact):
    return ((x.double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()


def random_inputs(B, T, H, K, V, *, sequences=None, dtype=torch.float64, seed=0):
    """q, k, v and a state, rounded to `dtype` (the state to its accumulator's)."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, T, H, K), (B, T, H, K), (B, T, H, V)]
    q, k, v = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)
    state = torch.randn(sequences or B, H, K, V, generator=g, dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return q, k * K**-0.5, v, state.to(wide)


def exact_gradients(q, k, v, log_gamma, state, do, dfinal):
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v, state)]
    o, final = reference.chunkwise(*leaves[:3], log_gamma, leaves[3], chunk_size=64)
    grads = torch.autograd.grad([o, final], leaves, [do.double(), dfinal.double()])
    return o.detach(), final.detach(), grads


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
def test_the_three_reference_forms_agree(heads, length):
    q, k, v, state = random_inputs(2, length, heads, 6, 10)
    log_gamma = log_decay(heads, NO_DECAY[:heads])
    o, final = reference.recurrent(q, k, v, log_gamma, state)
    others = [reference.parallel(q, k, v, log_gamma, state)]
    others += [reference.chunkwise(q, k, v, log_gamma, state, c) for c in (1, 7, 64, 500)]
    for o_other, final_other in others:
        assert relative_error(o_other, o) < 1e-14
        assert relative_error(final_other, final) < 1e-14


@settings(max_examples=60, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 150),
    H=st.integers(1, 4),
    K=st.integers(1, 9),
    V=st.integers(1, 9),
    form=st.sampled_from(["auto", *FORMS]),
    chunk_size=st.one_of(st.none(), st.integers(1, 200)),
    dtype=st.sampled_from(list(TOLERANCE)),
    rule=st.sampled_from(["power", "linspace", "explicit"]),
    seed=st.integers(0, 2**20),
)
def test_any_shape_form_and_dtype_matches_the_reference(
    B, T, H, K, V, form, chunk_size, dtype, rule, seed
):
    inputs = random_inputs(B, T, H, K, V, dtype=dtype, seed=seed)
    log_gamma = log_decay(H, [*NO_DECAY, -5.0][:H] if rule == "explicit" else rule)
    do, dfinal = torch.randn_like(inputs[2]), torch.randn_like(inputs[3])
    leaves = [x.clone().requires_grad_() for x in inputs]
    chunk_size = chunk_size if form in ("auto", "chunkwise") else None
    o, final = retention(*leaves[:3], log_gamma, state=leaves[3], form=form, chunk_size=chunk_size)
    grads = torch.autograd.grad([o, final], leaves, [do, dfinal])
    given = (*inputs[:3], log_gamma, inputs[3], do, dfinal)
    exact = exact_gradients(*given)
    # In a handful of numbers a sum may cancel: errors count against the sum of absolute terms.
    sizes = exact_gradients(*(x if x is log_gamma else x.abs() for x in given))
    assert o.dtype == dtype and final.dtype == inputs[3].dtype
    forward, backward = TOLERANCE[dtype]
    for x, e, size in zip((o, final), exact[:2], sizes[:2], strict=True):
        assert (x.double() - e).norm() <= forward * size.norm()
    for x, e, size in zip(grads, exact[2], sizes[2], strict=True):
        assert (x.double() - e).norm() <= backward * size.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 127, 1000, 4096])
@pytest.mark.parametrize("form", ["chunkwise", "parallel"])
def test_accuracy_at_the_size_of_a_model(form, length, dtype):
    inputs = random_inputs(1, length, 2, 64, 128, dtype=dtype)
    log_gamma = log_decay(2, [log_decay(8)[0].item(), log_decay(8)[7].item()])
    do, dfinal = torch.randn_like(inputs[2]), torch.randn_like(inputs[3])
    leaves = [x.clone().requires_grad_() for x in inputs]
    o, final = retention(*leaves[:3], log_gamma, state=leaves[3], form=form)
    grads = torch.autograd.grad([o, final], leaves, [do, dfinal])
    o_exact, final_exact, grads_exact = exact_gradients(
        *inputs[:3], log_gamma, inputs[3], do, dfinal
    )
    assert relative_error(o.detach(), o_exact) <= TOLERANCE[dtype][0]
    assert relative_error(final.detach(), final_exact) <= TOLERANCE[dtype][0]
    for x, exact in zip(grads, grads_exact, strict=True):
        assert relative_error(x, exact) <= TOLERANCE[dtype][1]


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 119), max_size=5, unique=True).map(sorted),
    forms=st.lists(st.sampled_from(FORMS), min_size=6, max_size=6),
)
def test_calls_split_at_any_points_are_one_call(cuts, forms):
    T, H = 120, 3
    q, k, v, state = random_inputs(2, T, H, 4, 6)
    log_gamma = log_decay(H)
    o, final = retention(q, k, v, log_gamma, state=state)
    pieces, carried = [], state
    for (a, b), form in zip(pairwise([0, *cuts, T]), forms, strict=False):
        part = (x[:, a:b] for x in (q, k, v))
        o_part, carried = retention(*part, log_gamma, state=carried, form=form)
        pieces.append(o_part)
    assert relative_error(torch.cat(pieces, dim=1), o) < 1e-13
    assert relative_error(carried, final) < 1e-13


def test_gradients_flow_through_the_state_from_call_to_call():
    q, k, v, _ = random_inputs(1, 100, 2, 4, 6)
    log_gamma, leaves = log_decay(2), [x.requires_grad_() for x in (q, k, v)]
    whole = torch.autograd.grad(retention(*leaves, log_gamma)[0].sin().sum(), leaves)
    o_first, carried = retention(*(x[:, :37] for x in leaves), log_gamma)
    o_rest, _ = retention(*(x[:, 37:] for x in leaves), log_gamma, state=carried)
    split = torch.autograd.grad(torch.cat([o_first, o_rest], 1).sin().sum(), leaves)
    for x, exact in zip(split, whole, strict=True):
        assert relative_error(x, exact) < 1e-13


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 80), min_size=1, max_size=6).filter(any),
    form=st.sampled_from(FORMS),
    backend=st.sampled_from(["torch", "reference"]),
)
def test_packed_sequences_are_each_alone(lengths, form, backend):
    H, total = 2, sum(lengths)
    q, k, v, state = random_inputs(1, total, H, 3, 5, sequences=len(lengths))
    do, dfinal = torch.randn_like(v), torch.randn_like(state)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, state)]
    bounds = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    o, final = retention(
        *leaves[:3],
        log_decay(H),
        state=leaves[3],
        cu_seqlens=torch.tensor(bounds),
        form=form,
        backend=backend,
    )
    grads = torch.autograd.grad([o, final], leaves, [do, dfinal])
    for n, (a, b) in enumerate(pairwise(bounds)):
        if a == b:
            assert torch.equal(final[n], state[n])
            assert torch.equal(grads[3][n], dfinal[n])
            continue
        rows = slice(n, n + 1)
        tokens = (x[:, a:b] for x in (q, k, v))
        o_exact, final_exact, exact = exact_gradients(
            *tokens, log_decay(H), state[rows], do[:, a:b], dfinal[rows]
        )
        assert relative_error(o.detach()[:, a:b], o_exact) < 1e-13
        assert relative_error(final.detach()[rows], final_exact) < 1e-13
        for x, e in zip((*(g[:, a:b] for g in grads[:3]), grads[3][rows]), exact, strict=True):
            assert relative_error(x, e) < 1e-12


def test_inputs_need_not_be_contiguous():
    q, k, v, state = random_inputs(2, 70, 3, 4, 6)
    o, final = retention(q, k, v, log_decay(3), state=state)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    transposed = state.transpose(2, 3).contiguous().transpose(2, 3)
    o_views, final_views = retention(*views, log_decay(3), state=transposed)
    assert relative_error(o_views, o) < 1e-14 and relative_error(final_views, final) < 1e-14
    assert o_views.is_contiguous() and final_views.is_contiguous()


def test_state_is_optional_both_ways_and_never_written():
    q, k, v, state = random_inputs(1, 5, 2, 3, 4)
    before = state.clone()
    for form in FORMS:
        _, final = retention(q, k, v, log_decay(2), state=state, form=form)
        assert final is not None and final.data_ptr() != state.data_ptr()
        assert torch.equal(state, before)
        _, none = retention(q, k, v, log_decay(2), form=form, output_state=False)
        assert none is None
        from_zeros = retention(q, k, v, log_decay(2), state=torch.zeros_like(state), form=form)[0]
        assert torch.equal(retention(q, k, v, log_decay(2), form=form)[0], from_zeros)


def test_gradcheck():
    q, k, v, state = (x.requires_grad_() for x in random_inputs(1, 9, 2, 2, 3, sequences=3))
    cu_seqlens = torch.tensor([0, 4, 4, 9])

    def run(q, k, v, state):
        return retention(
            q,
            k,
            v,
            log_decay(2),
            state=state,
            cu_seqlens=cu_seqlens,
            form="chunkwise",
            chunk_size=3,
        )

    assert torch.autograd.gradcheck(run, (q, k, v, state))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("from_state", [False, True])
def test_opcheck(packed, from_state):
    q, k, v, state = random_inputs(1, 30, 2, 3, 4, sequences=2 if packed else 1)
    cu_seqlens = torch.tensor([0, 11, 30]) if packed else None
    leaves = [x.requires_grad_() for x in (q, k, v)]
    state = state.requires_grad_() if from_state else None
    torch.library.opcheck(chunkwise, (*leaves, log_decay(2), state, cu_seqlens, 8))


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=9).filter(any),
    heads=st.integers(1, 40),
    chunk_size=st.integers(1, 150),
)
def test_there_is_room_for_the_state_before_every_segment(lengths, heads, chunk_size):
    total = sum(lengths)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    q = torch.empty(1, total, heads, 1)
    segments = list(_segments(bounds, 1, total, heads, chunk_size))
    assert sum(s.tokens.stop - s.tokens.start for s in segments) == total
    needed = sum(not s.is_first for s in segments)
    assert needed <= len(_new_kept(q, q, bounds, chunk_size))


@settings(max_examples=100, deadline=None)
@given(
    batch=st.integers(1, 70),
    length=st.integers(1, 400),
    heads=st.integers(1, 40),
    chunk_size=st.integers(1, 150),
)
def test_rows_are_worked_on_once_and_keep_no_more_states_than_they_need(
    batch, length, heads, chunk_size
):
    q = torch.empty(batch, length, heads, 1)
    segments = list(_segments(None, batch, length, heads, chunk_size))
    seen = torch.zeros(batch, length)
    for segment in segments:
        seen[segment.rows, segment.tokens] += 1
    assert bool((seen == 1).all())
    assert sum(not s.is_first for s in segments) == len(_new_kept(q, q, None, chunk_size))


def test_short_documents_keep_no_states():
    q, k, v, _ = (x.requires_grad_() for x in random_inputs(1, 400, 2, 16, 32))
    cu_seqlens, kept = torch.arange(0, 401, 4), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        retention(q, k, v, log_decay(2), cu_seqlens=cu_seqlens)
    inputs = sum(x.numel() for x in (q, k, v, cu_seqlens)) + 2
    assert sum(x.numel() for x in kept) <= inputs + 400 // 64 * 2 * 16 * 32 * 4


def test_compiles_into_one_graph():
    q, k, v, state = (x.requires_grad_() for x in random_inputs(1, 150, 2, 4, 6))
    log_gamma = log_decay(2)

    def run(q, k, v, state):
        o, final = retention(q, k, v, log_gamma, state=state)
        return o.sin().sum() + final.sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    exact = torch.autograd.grad(run(q, k, v, state), (q, k, v, state))
    grads = torch.autograd.grad(compiled(q, k, v, state), (q, k, v, state))
    for x, e in zip(grads, exact, strict=True):
        assert torch.equal(x, e)


def test_backward_keeps_its_inputs_and_a_state_a_segment():
    q, k, v, state = (x.requires_grad_() for x in random_inputs(1, 4000, 2, 16, 32))
    kept = {}

    def pack(x):
        kept[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        log_gamma = log_decay(2)
        retention(q, k, v, log_gamma, state=state)
    beside_inputs = set(kept) - {x.data_ptr() for x in (q, k, v, log_gamma)}
    assert sum(kept[x] for x in beside_inputs) < (q.numel() + k.numel() + v.numel()) / 20


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_steps_are_the_recurrent_form(inplace, dtype):
    q, k, v, state = random_inputs(3, 4, 2, 5, 6, dtype=dtype)
    exact = reference.recurrent(q.double(), k.double(), v.double(), log_decay(2), state.double())
    given_state = state.clone()
    o, final = retention_step(q, k, v, log_decay(2), given_state, inplace=inplace)
    assert relative_error(o, exact[0]) <= TOLERANCE[dtype][0]
    assert relative_error(final, exact[1]) <= TOLERANCE[dtype][0]
    assert (final.data_ptr() == given_state.data_ptr()) == inplace
    assert torch.equal(given_state, state) != inplace


@pytest.mark.parametrize("inplace", [False, True])
def test_inactive_rows_stand_still_whatever_they_hold(inplace):
    q, k, v, state = random_inputs(3, 2, 2, 5, 6)
    alone = retention_step(q[1:2], k[1:2], v[1:2], log_decay(2), state[1:2])
    for x in (q, k, v):
        x[[0, 2]] = float("nan")
    before, active = state.clone(), torch.tensor([False, True, False])
    o, final = retention_step(q, k, v, log_decay(2), state, active=active, inplace=inplace)
    assert torch.equal(final[[0, 2]], before[[0, 2]])
    assert not o[[0, 2]].any()
    assert torch.allclose(o[1:2], alone[0]) and torch.allclose(final[1:2], alone[1])


def test_chunk_size_is_chosen_from_heads_dims_and_length():
    def chosen(B, T, H, K, V):
        return default_chunk_size(torch.empty(B, T, H, K), torch.empty(B, T, H, V))

    assert chosen(1, 50, 8, 64, 128) == 50
    assert chosen(1, 10_000, 8, 64, 128) == 64
    assert chosen(1, 10_000, 8, 8, 16) == 32
    assert chosen(1, 10_000, 8, 256, 512) == 128
