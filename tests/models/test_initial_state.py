"""A tuned initial state: every text begins with it, however its tokens come to the model."""

import pytest
import torch
from torch import Tensor, nn

from retentive.compress.quantize import quantize
from retentive.errors import InputError
from retentive.models.checkpoint import save_model
from retentive.models.language_model import LanguageModel
from retentive.models.state import RetNetState, concat

EXACT = {"rtol": 0.0, "atol": 1e-11}
BOUNDS = torch.tensor([0, 4, 11, 17, 22])  # of four documents, two a row of 11 tokens


@pytest.fixture
def tuned(retnet: LanguageModel) -> LanguageModel:
    """Its layers begin with random states."""
    torch.manual_seed(2)
    for layer in retnet.tunable:
        layer.initial_state = nn.Parameter(torch.randn(layer.state_shape, dtype=torch.float64))
    return retnet.requires_grad_(False)


def alone(model: LanguageModel, row: Tensor) -> tuple[Tensor, RetNetState]:
    """Tokens `[T]` one by one, from the model's empty state."""
    state, logits = model.init_state(1), []
    for token in row:
        made, state = model(token.view(1, 1), state)
        logits.append(made[0])
    return torch.cat(logits), state


def same(state: RetNetState, wanted: list[RetNetState]) -> None:
    for index, layer in enumerate(state.layers):
        for row, one in enumerate(wanted):
            if layer.kind == "retention":
                torch.testing.assert_close(layer["S"][row], one.layers[index]["S"][0], **EXACT)


def test_rows_and_padded_rows(tuned: LanguageModel, tokens: Tensor) -> None:
    mask = torch.arange(11) < torch.tensor([[11], [5], [8]])
    for real in (torch.ones_like(mask), mask):
        logits, state = tuned(tokens, padding_mask=real)
        rows = [alone(tuned, row[keep]) for row, keep in zip(tokens, real, strict=True)]
        for made, keep, (wanted, _) in zip(logits, real, rows, strict=True):
            torch.testing.assert_close(made[keep], wanted, **EXACT)
        same(state, [after for _, after in rows])


def test_packed_documents(tuned: LanguageModel, tokens: Tensor) -> None:
    flat = tokens[:2].flatten()
    h, _ = tuned.hidden(flat[None], layout=tuned.packed_layout(BOUNDS))
    documents = flat.split(BOUNDS.diff().tolist())
    wanted = torch.cat([alone(tuned, document)[0] for document in documents])
    torch.testing.assert_close(tuned.head(h)[0], wanted, **EXACT)


def test_packed_rows_that_go_on(tuned: LanguageModel, tokens: Tensor) -> None:
    """Of two rows the first goes on with what it has read, and both begin a document within."""
    flat, read = tokens[:2].flatten(), alone(tuned, tokens[2])[1]
    before = concat([read, tuned.init_state(1)])
    layout = tuned.packed_layout(BOUNDS, rows=2, state=before)
    h, after = tuned.hidden(flat[None], before, layout=layout)
    documents = list(flat.split(BOUNDS.diff().tolist()))
    wanted = [alone(tuned, torch.cat((tokens[2], documents[0])))]
    wanted += [alone(tuned, document) for document in documents[1:]]
    logits = torch.cat([wanted[0][0][11:], *(made for made, _ in wanted[1:])])
    torch.testing.assert_close(tuned.head(h)[0], logits, **EXACT)
    assert after is not None
    same(after, [wanted[1][1], wanted[3][1]])


def test_its_gradient(tuned: LanguageModel, tokens: Tensor) -> None:
    """Along random directions, against finite differences; from packed documents."""
    flat, layout = tokens[:2].flatten(), tuned.packed_layout(BOUNDS)
    states = [layer.initial_state for layer in tuned.tunable if layer.initial_state is not None]
    for state in states:
        state.requires_grad_()

    def loss() -> Tensor:
        return tuned.loss(tuned.hidden(flat[None, :], layout=layout)[0][0, :-1], flat[1:])

    gradients = torch.autograd.grad(loss(), states)
    step = 1e-5
    for _ in range(2):
        directions = [step * torch.randn_like(state) for state in states]
        ends = []
        with torch.no_grad():
            for times in (1, -2):  # a step to one side of the value, then to the other
                for state, direction in zip(states, directions, strict=True):
                    state.add_(times * direction)
                ends.append(loss().item())
            for state, direction in zip(states, directions, strict=True):
                state.add_(direction)
        found = sum((g * d).sum().item() for g, d in zip(gradients, directions, strict=True))
        assert found == pytest.approx((ends[0] - ends[1]) / 2, rel=1e-6, abs=1e-13)


def test_what_no_model_folder_holds_is_refused_in_a_line(tuned, tmp_path) -> None:
    for refused in (
        lambda: save_model(tuned, tmp_path / "saved"),
        lambda: quantize(tuned.float(), 8),
    ):
        with pytest.raises(InputError, match="a tuned state is no part of a model folder"):
            refused()
    assert not list(tmp_path.iterdir())
