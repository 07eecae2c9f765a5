"""What holds for every model: one call for any tokens at any time, each row as if alone."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from retentive.errors import InputError
from retentive.mixers.state import TensorState
from retentive.models.language_model import LanguageModel
from retentive.models.state import RetNetState, concat
from retentive.ops import FORMS

EXACT = {"rtol": 0.0, "atol": 1e-11}


def assert_same_state(given: RetNetState, wanted: RetNetState) -> None:
    """Equal in what each row remembers; a cache's room and what lies beyond a row may differ."""
    assert torch.equal(given.positions, wanted.positions)
    for row in range(given.batch_size):
        for one, other in zip(given.layers, wanted.layers, strict=True):
            of_retention = isinstance(one, TensorState)
            pair = (x["S"][row] if of_retention else x.row(row) for x in (one, other))
            torch.testing.assert_close(*pair, **EXACT)


def gradients(model: LanguageModel, value: Tensor, keep: bool = False) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(model.parameters()), retain_graph=keep))


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.sets(st.integers(1, 10)))
def test_any_split_into_calls_is_one_call(
    model: LanguageModel, tokens: Tensor, cuts: set[int]
) -> None:
    whole, wanted = model(tokens)
    state, pieces = None, []
    for piece in tokens.tensor_split(sorted(cuts), dim=1):
        logits, state = model(piece, state)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **EXACT)
    assert_same_state(state, wanted)


def test_without_gradients_too(model: LanguageModel, tokens: Tensor) -> None:
    """Decoding takes other paths then: single steps, keys appended in place."""
    whole, wanted = model(tokens)
    with torch.no_grad():
        pieces, state = [], model.init_state(3, capacity=8)
        for piece in tokens.tensor_split([4, 5, 6, 9], dim=1):
            logits, state = model(piece, state)
            pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **EXACT)
    assert_same_state(state, wanted)


def test_every_form_is_the_same_model(retnet: LanguageModel, tokens: Tensor) -> None:
    whole, wanted = retnet(tokens)
    for form in FORMS:
        _, state = retnet.set_kernels(form=form)(tokens[:, :4])
        logits, after = retnet(tokens[:, 4:], state)
        torch.testing.assert_close(logits, whole[:, 4:], **EXACT)
        assert_same_state(after, wanted)


MASKS = {
    "left": [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]],
    "right": [[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]],
    "holes": [[0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 1], [0, 1, 1, 1, 1, 0]],
    "empty row": [[0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]],
    "none": [[1] * 6] * 3,
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "carried"])
def test_padded_rows_are_rows_alone(
    model: LanguageModel, tokens: Tensor, name: str, carried: bool
) -> None:
    mask = torch.tensor(MASKS[name], dtype=torch.bool)
    state = None
    if carried:  # rows that stand at different positions
        _, state = model(
            tokens[:, :5], padding_mask=torch.arange(5) < torch.tensor([[2], [5], [1]])
        )
    new = tokens[:, 5:]
    weights = torch.randn(3, 6, 61, dtype=torch.float64, generator=torch.manual_seed(2))
    logits, after = model(new, state, padding_mask=mask)
    assert torch.equal(logits[~mask], torch.zeros_like(logits[~mask]))

    alone, states = torch.zeros_like(logits), []
    for row, real in enumerate(mask):
        before = None if state is None else state.select([row])
        if real.any():
            own, own_after = model(new[row, real][None], before)
            alone[row, real] = own[0]
        else:
            own_after = model.init_state(1) if before is None else before
        states.append(own_after)
    torch.testing.assert_close(logits, alone, **EXACT)
    assert_same_state(after, concat(states))
    for one, other in zip(
        gradients(model, (logits * weights).sum(), keep=True),
        gradients(model, (alone * weights).sum()),
        strict=True,
    ):
        torch.testing.assert_close(one, other, **EXACT)


def test_decoding_goes_on_from_ragged_prompts(model: LanguageModel, tokens: Tensor) -> None:
    mask = torch.arange(8) < torch.tensor([[8], [3], [5]])
    with torch.no_grad():
        _, state = model(tokens[:, :8], padding_mask=mask)
        for step in range(3):
            logits, state = model(tokens[:, 8 + step, None], state)
        for row, length in enumerate([8, 3, 5]):
            text = torch.cat((tokens[row, :length], tokens[row, 8:]))
            torch.testing.assert_close(logits[row, -1], model(text[None])[0][0, -1], **EXACT)


@pytest.mark.parametrize("lengths", [[11, 11, 11], [33], [1, 10, 3, 8, 5, 5, 1], [30, 0, 3]])
def test_packed_sequences_are_sequences_alone(
    model: LanguageModel, tokens: Tensor, lengths: list[int]
) -> None:
    packed = tokens.reshape(1, -1)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    h, state = model.hidden(packed, layout=model.packed_layout(bounds))
    assert state is None
    texts = [text for text in packed[0].split(lengths) if len(text)]
    alone = torch.cat([model.hidden(text[None])[0] for text in texts], 1)
    torch.testing.assert_close(h, alone, **EXACT)
    targets = packed.roll(-1, 1)
    for one, other in zip(
        gradients(model, model.loss(h, targets)),
        gradients(model, model.loss(alone, targets)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, **EXACT)


def test_packed_sequences_each_with_its_state(model: LanguageModel, tokens: Tensor) -> None:
    _, state = model(tokens[:, :4])
    packed = torch.cat((tokens[0, 4:], tokens[1, 4:6], tokens[2, 4:9]))[None]
    layout = model.packed_layout(torch.tensor([0, 7, 9, 14]), state=state)
    h, after = model.hidden(packed, state, layout=layout)
    rows = [(0, 11), (1, 6), (2, 9)]
    alone = [model.hidden(tokens[row, None, :end]) for row, end in rows]
    torch.testing.assert_close(h, torch.cat([x[:, 4:] for x, _ in alone], 1), **EXACT)
    assert_same_state(after, concat([own for _, own in alone]))


def test_rows_carry_their_documents_from_step_to_step(model: LanguageModel) -> None:
    """Truncated back-propagation: two rows of 6 tokens, documents cut where a row ends."""
    generator = torch.manual_seed(3)
    streams = torch.randint(0, 61, (2, 12), generator=generator)
    # Documents of row 0: tokens 0-8, 8-12; of row 1: 0-2, 2-6, 6-12.
    first = model.packed_layout(torch.tensor([0, 6, 8, 12]), rows=2)
    h_first, state = model.hidden(streams[:, :6].reshape(1, -1), layout=first)
    state = model.restart_rows(state, torch.tensor([False, True]))
    second = model.packed_layout(torch.tensor([0, 2, 6, 12]), rows=2, state=state)
    h_second, state = model.hidden(streams[:, 6:].reshape(1, -1), state, layout=second)

    documents = [streams[0, :8], streams[0, 8:], streams[1, :2], streams[1, 2:6], streams[1, 6:]]
    alone = [model.hidden(document[None]) for document in documents]
    rows = torch.cat([h for h, _ in alone[:2]], 1), torch.cat([h for h, _ in alone[2:]], 1)
    given = torch.cat((h_first.view(2, 6, -1), h_second.view(2, 6, -1)), 1)
    torch.testing.assert_close(given, torch.cat(rows), **EXACT)
    assert_same_state(state, concat([alone[1][1], alone[4][1]]))


def test_forward_leaves_its_state_alone_and_branches(model: LanguageModel, tokens: Tensor) -> None:
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            _, state = model(tokens[:, :4], model.init_state(3, capacity=20))
            kept = [x.clone() for layer in state.layers for x in layer.tensors().values()]
            branches = [model(tokens[:, a:b], state) for a, b in ((4, 7), (7, 11), (4, 5))]
            again, _ = model(tokens[:, 4:7], state)
            now = [x for layer in state.layers for x in layer.tensors().values()]
            assert all(torch.equal(x, y) for x, y in zip(kept, now, strict=True))
            torch.testing.assert_close(again, branches[0][0], **EXACT)
            onwards, _ = model(tokens[:, 7:], branches[0][1])
            whole, _ = model(tokens)
            torch.testing.assert_close(onwards, whole[:, 7:], **EXACT)


def test_gradients_reach_back_through_a_state(model: LanguageModel, tokens: Tensor) -> None:
    whole, _ = model(tokens)
    _, state = model(tokens[:, :6])
    split, _ = model(tokens[:, 6:], state)
    wanted = gradients(model, whole[:, 6:].square().sum())
    for one, other in zip(gradients(model, split.square().sum()), wanted, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    _, state = model(tokens[:, :6])
    cut, _ = model(tokens[:, 6:], state.detach())
    detached = [x for layer in state.detach().layers for x in layer.tensors().values()]
    assert not any(x.requires_grad for x in detached)
    assert not torch.allclose(gradients(model, cut.square().sum())[0], wanted[0])


def test_embeddings_stand_for_tokens(model: LanguageModel, tokens: Tensor) -> None:
    h, _ = model.hidden(tokens)
    torch.testing.assert_close(model.hidden(model.embed_tokens(tokens))[0], h, **EXACT)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_gives_equal_gradients(make_model, tokens, dropout) -> None:
    found = []
    for name in ("retnet-official", "parallel", "xpos", "hybrid", "transformer"):
        for checkpointed in (False, True):
            model = make_model(name, dropout=dropout).train()
            model.checkpoint_layers = checkpointed
            torch.manual_seed(0)
            h, _ = model.hidden(tokens)
            found.append(gradients(model, model.loss(h, tokens)))
        for one, other in zip(*found[-2:], strict=True):
            torch.testing.assert_close(one, other, **EXACT)


def test_what_a_checkpointed_block_computes_again_it_computes_once(make_model, tokens) -> None:
    model = make_model("retnet").train()
    calls = []
    for part in (model.layers[0].ffn.down_proj, model.layers[0].ffn.up_proj):
        part.register_forward_hook(lambda *_, part=part: calls.append(part))
    model.checkpoint_layers = True
    h, _ = model.hidden(tokens)
    model.loss(h, tokens).backward()
    assert calls.count(model.layers[0].ffn.up_proj) == 2
    assert calls.count(model.layers[0].ffn.down_proj) <= 2


def test_dropout_acts_in_training_only(make_model, tokens: Tensor) -> None:
    model = make_model("retnet", dropout=0.5)
    assert not torch.equal(model.train()(tokens)[0], model(tokens)[0])
    assert torch.equal(model.eval()(tokens)[0], model(tokens)[0])


def test_inference_mode_and_back(model: LanguageModel, tokens: Tensor) -> None:
    with torch.inference_mode():
        _, state = model(tokens[:, :4], model.init_state(3, capacity=20))
    with torch.no_grad():
        logits, _ = model(tokens[:, 4:], state)
    torch.testing.assert_close(logits, model(tokens)[0][:, 4:], **EXACT)


@pytest.mark.parametrize(
    ("name", "training"), [("retnet", False), ("retnet-official", True), ("parallel", False)]
)
def test_compiles_as_one_graph(make_model, tokens: Tensor, name: str, training: bool) -> None:
    model = make_model(name).train(training)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training):
        logits, state = compiled(tokens[:, :8])
        torch.testing.assert_close(logits, model(tokens[:, :8])[0], **EXACT)
        step, _ = compiled(tokens[:, 8:9], state.detach())
        torch.testing.assert_close(step, model(tokens[:, :9])[0][:, 8:], **EXACT)
        if training:
            one = gradients(model, logits.square().sum())
            other = gradients(model, model(tokens[:, :8])[0].square().sum())
            for x, y in zip(one, other, strict=True):
                torch.testing.assert_close(x, y, **EXACT)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo
def test_compiles_packed_and_with_the_loss(make_model, tokens: Tensor) -> None:
    model = make_model("retnet")
    layout = model.packed_layout(torch.tensor([0, 4, 11, 22, 33]), rows=3)

    def step(packed: Tensor) -> Tensor:
        h, _ = model.hidden(packed, layout=layout)
        return model.loss(h, packed)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    packed = tokens.reshape(1, -1)
    torch.testing.assert_close(compiled(packed), step(packed), **EXACT)
    for x, y in zip(
        gradients(model, compiled(packed)), gradients(model, step(packed)), strict=True
    ):
        torch.testing.assert_close(x, y, **EXACT)


def test_weights_have_their_values_from_the_seed(make_model) -> None:
    one, other = make_model("retnet"), make_model("retnet")
    assert all(torch.equal(x, y) for x, y in zip(one.parameters(), other.parameters(), strict=True))
    other.init_weights(seed=1)
    assert not torch.equal(one.embed_tokens.weight, other.embed_tokens.weight)
    assert one.embed_tokens.weight.std().item() == pytest.approx(32**-0.5, rel=0.1)


@pytest.mark.parametrize("name", ["post-norm", "parallel", "hybrid"])
def test_norms_and_biases_start_as_if_they_were_not_there(make_model, name: str) -> None:
    model = make_model(name)
    model.init_weights(seed=0)
    vectors = {key: weight for key, weight in model.named_parameters() if weight.ndim == 1}
    assert any("bias" in key for key in vectors) and any("norm" in key for key in vectors)
    for key, weight in vectors.items():
        assert torch.equal(weight, torch.full_like(weight, "bias" not in key)), key


def xavier(fan_in: int, fan_out: int) -> float:
    """The deviation of xavier's rules, normal or uniform, at gain 1."""
    return (2 / (fan_in + fan_out)) ** 0.5


@pytest.mark.parametrize("rule", ["paper", "official"])
def test_initialisation(make_model, rule: str) -> None:
    D = 128
    sizes = {"hidden_size": D, "qk_dim": D, "value_dim": 2 * D, "intermediate_size": 2 * D}
    block = make_model("retnet", **sizes, initialization=rule).layers[0]
    deepnet = (8 * 2) ** -0.25
    wanted = {
        "paper": {
            block.retention.q_proj: xavier(D, D),
            block.retention.v_proj: deepnet * xavier(D, 2 * D),
            block.retention.g_proj: deepnet * xavier(D, 2 * D),
            block.retention.o_proj: deepnet * xavier(D, 2 * D),
            block.ffn.down_proj: deepnet * xavier(D, 2 * D),
        },
        "official": {
            block.retention.q_proj: 2**-2.5 * xavier(D, D),
            block.retention.v_proj: 2**-2.5 * xavier(D, 2 * D),
            block.retention.g_proj: 2**-2.5 * xavier(D, 2 * D),
            block.retention.o_proj: 2**-1 * xavier(D, 2 * D),
            block.ffn.down_proj: (2 * D) ** -0.5 / 3**0.5,  # uniform on ± fan_in^(-1/2)
        },
    }
    for projection, deviation in wanted[rule].items():
        assert projection.weight.std().item() == pytest.approx(deviation, rel=0.05)


def refused(call, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_refuses_what_does_not_fit(model: LanguageModel, tokens: Tensor, make_model) -> None:
    _, state = model(tokens)
    refused(lambda: model(tokens + 30), "89", "0 to 60")
    refused(lambda: model(tokens - 61), "-61", "0 to 60")
    refused(lambda: model(tokens[:, :0]), "[3, 0]")
    refused(lambda: model(tokens[0]), "[11]", "[B,T]")
    refused(lambda: model(tokens.tolist()), "a list", "[B,T]")
    for dtype in (torch.float32, torch.int16, torch.bool):
        refused(lambda dtype=dtype: model(tokens.to(dtype)), str(dtype)[6:], "int64", "[B,T,32]")
    refused(lambda: model.hidden(torch.zeros(3, 11, 31)), "[3, 11, 31]", "[B,T,32]")
    refused(lambda: model(tokens[:2], state), "3 rows", "2")
    refused(lambda: model(tokens, state.layers), "list")
    refused(lambda: model(tokens, padding_mask=torch.ones(3, 4)), "[3, 4]", "[3, 11]")
    refused(lambda: model(tokens, padding_mask=torch.zeros(3, 11)), "no token")
    refused(lambda: model.packed_layout(torch.tensor([0, 5, 4])), "[0, 5, 4]")
    refused(lambda: model.packed_layout(torch.tensor([1, 5])), "[1, 5]")
    refused(lambda: model.packed_layout(torch.tensor([0, 5, 12]), rows=2), "2", "12")
    refused(lambda: model.packed_layout(torch.tensor([0, 5]), rows=2), "2", "5")
    layout = model.packed_layout(torch.tensor([0, 5, 12]))
    refused(lambda: model.hidden(tokens, layout=layout), "[3, 11]", "[1, 12]")
    h, _ = model.hidden(tokens)
    refused(lambda: model.loss(h, tokens[:, 1:]), "[3, 10]")
    refused(lambda: model.loss(h, tokens + 61), "0 to 60")
    refused(lambda: model.loss(h, tokens, reduction="men"), "mean or sum")
    for other in ("retnet", "transformer", "transformer-gqa"):
        for changes in ({}, {"num_hidden_layers": 3}, {"num_heads": 2, "num_kv_heads": 2}):
            if other == "retnet":
                changes = {k: v for k, v in changes.items() if k != "num_kv_heads"}
            stranger = make_model(other, **changes)
            signatures = [layer.signature for layer in state.layers]
            foreign = stranger.init_state(3)
            if [layer.signature for layer in foreign.layers] != signatures:
                refused(lambda foreign=foreign: model(tokens, foreign), "another model")
