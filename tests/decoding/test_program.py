"""What a program is written from, and when there is none."""

from dataclasses import replace

import pytest
import torch
import zoo
from torch import nn

from retentive.compress.quantize import quantize
from retentive.decoding.program_runner import FEW, ProgramRunner, read, reads, suits
from retentive.decoding.runner import runner
from retentive.errors import InputError
from retentive.kernels.cpu.available import available
from retentive.models.config import RetNetConfig
from retentive.models.retnet import RetNet
from retentive.models.state import RetNetState

pytestmark = pytest.mark.skipif(not available(), reason="needs numba, and Linux")

CONFIG = zoo.retnet(vocab_size=61, hidden_size=64, num_hidden_layers=2, num_heads=4)


def build(seed: int = 0) -> RetNet:
    model = RetNet(CONFIG)
    model.init_weights(seed=seed)
    return model.eval()


def logits(model: RetNet, rows: int, tokens: list[int]) -> torch.Tensor:
    """After each token, the same in each row."""
    decoding = runner(model, model.init_state(rows))
    assert isinstance(decoding, ProgramRunner)
    return torch.stack([decoding.step(torch.tensor([token] * rows)) for token in tokens])


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_a_text_does_not_depend_on_its_neighbours(bits):
    """To the last bit, in a batch of any size: so writing it again gives the same text."""
    model, tokens = build(), [5, 7, 11]
    model = model if bits == 32 else quantize(model, bits)
    alone = logits(model, 1, tokens)
    for rows in (2, 3, 4, 7, 8, 13, 16, 40):
        assert torch.equal(logits(model, rows, tokens), alone.expand(-1, rows, -1))


def test_a_batch_of_no_rows_has_a_runner():
    model = build()
    assert runner(model, model.init_state(0)).state.batch_size == 0


def test_a_runner_keeps_the_weights_it_was_made_for():
    """Also where the model's are elsewhere by now, and their memory would be given to others."""
    model = build()
    expected = logits(model, 1, [3])[0]
    decoding = runner(model, model.init_state(1))
    model.double()
    others = [torch.full((64, 64), 7.0) for _ in range(100)]
    model.float()
    assert torch.equal(decoding.step(torch.tensor([3])), expected)
    del others


def test_a_state_that_is_no_block_of_memory():
    model = build()
    state = model.init_state(2)
    for layer in state.layers:
        layer["S"].copy_(torch.randn_like(layer["S"]))
    strided = [replace(x, values={"S": x["S"].mT.contiguous().mT}) for x in state.layers]
    tokens = torch.tensor([3, 4])
    expected = runner(model, state).step(tokens)
    assert torch.equal(runner(model, type(state)(state.positions, strided)).step(tokens), expected)


def test_gathered_logits_are_not_written_over():
    model = build()
    decoding = runner(model, model.init_state(1))
    first = decoding.step(torch.tensor([3]))
    kept = first.clone()
    decoding.step(torch.tensor([4]))
    assert torch.equal(first, kept)


@pytest.mark.parametrize("fields", [{}, {"num_kv_heads": 2, "row_scale": True, "gated_ffn": True}])
@pytest.mark.parametrize("rows", [[[3]], [[3, 4, 5]], [[3, 4, 5, 6], [7, 8, 9, 10]]])
@torch.no_grad()
def test_a_short_prompt_is_read_as_the_model_reads_it(rows, fields):
    model = RetNet(RetNetConfig.from_dict({**CONFIG.to_dict(), **fields})).eval()
    _, before = model(torch.tensor([[1, 2]] * len(rows)))
    assert reads(model, rows)
    state = read(model, rows, before)
    _, expected = model.double()(torch.tensor(rows), doubled(before))
    assert state.positions.tolist() == expected.positions.tolist()
    for got, exact in zip(state.layers, expected.layers, strict=True):
        assert (got["S"] - exact["S"]).norm() < 1e-6 * exact["S"].norm()


def test_the_state_read_from_stays_as_it_was():
    model = build()
    state = model.init_state(1)
    read(model, [[3, 4]], state)
    assert not any(layer["S"].any() for layer in state.layers) and not state.positions.any()


def test_other_prompts_are_left_to_the_model():
    model = build()
    assert reads(model, [[3] * FEW[32]]) and not reads(model, [[3] * (FEW[32] + 1)])
    assert reads(quantize(model, 8), [[3] * (FEW[32] + 1)])
    assert not reads(model, [[3], [4, 5]]) and not reads(model.double(), [[3]])


def doubled(state: RetNetState) -> RetNetState:
    return RetNetState(
        state.positions, [replace(x, values={"S": x["S"].double()}) for x in state.layers]
    )


class Adapter(nn.Linear):
    pass


def test_what_a_program_does_not_know_is_left_to_the_modules():
    adapted, hooked, replaced, exact = (build() for _ in range(4))
    ffn = adapted.layers[1].get_submodule("ffn")
    ffn.down_proj = Adapter(ffn.down_proj.in_features, 64)
    hooked.layers[0].register_forward_hook(lambda *_: None)
    replaced.norm.forward = lambda x: x
    assert suits(build()) and suits(build().bfloat16())
    assert not any(suits(model) for model in (adapted, hooked, replaced, exact.double()))


def test_weights_that_it_would_read_wrongly_are_left_to_the_modules():
    columns, half, mixed = build(), build(), build()
    columns.lm_head.weight.data = columns.lm_head.weight.mT.contiguous().mT
    half.lm_head.half()
    mixed.layers[0].ffn.up_proj.double()
    assert not any(suits(model) for model in (columns, half, mixed))


def test_what_does_not_fit_is_refused():
    model = build()
    fields = {**CONFIG.to_dict(), "num_heads": 2}
    other = RetNet(RetNetConfig.from_dict(fields))
    with pytest.raises(InputError, match="of another model"):
        runner(model, other.init_state(1))
    with pytest.raises(InputError, match="in another dtype"):
        runner(model, doubled(model.init_state(1)))
    with pytest.raises(InputError, match="one token per sequence: got \\[1\\] for a batch of 3"):
        runner(model, model.init_state(3)).step(torch.tensor([5]))


def test_dropout_does_nothing_while_decoding():
    model, plain = RetNet(replace(CONFIG, dropout=0.5)).eval(), build()
    model.load_state_dict(plain.state_dict())
    assert torch.equal(logits(model, 2, [3, 4]), logits(plain, 2, [3, 4]))
