"""One update: what it accumulates, carries, saves and refuses."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from retentive.data.dataset import Corpus, prepare
from retentive.errors import InputError
from retentive.train.config import RunConfig
from retentive.train.trainer import Diverged, Trainer
from retentive.train.validate import validate

Tiny = Callable[..., RunConfig]
EXACT = {"dtype": "float64"}


@pytest.fixture
def corpus(tiny: Tiny) -> Corpus:
    return prepare(tiny().data)


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    """Of the first step, as the optimizer would see them."""
    trainer.optimizer.step = lambda: None  # type: ignore[method-assign]
    trainer.optimizer.zero_grad = lambda set_to_none: None  # type: ignore[method-assign]
    trainer.update()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters()}  # type: ignore[union-attr]


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_accumulated_gradients_equal_those_of_the_whole_batch(
    tiny: Tiny, corpus: Corpus, carry: bool, micro_batch: int
):
    model, train = {"dropout": 0.0}, EXACT | {"carry_state": carry}
    whole = Trainer(tiny(model=model, train=train), corpus)
    pieces = Trainer(tiny(model=model, train=train | {"micro_batch": micro_batch}), corpus)
    expected, found = gradients(whole), gradients(pieces)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-13, msg=name)
    if carry:
        assert whole.state is not None and pieces.state is not None
        for one, other in zip(whole.state.layers, pieces.state.layers, strict=True):
            torch.testing.assert_close(one["S"], other["S"])


def test_the_loss_is_the_mean_over_the_tokens_of_all_rows(tiny: Tiny, corpus: Corpus):
    """Row by row without packing: every sequence of the batch alone, from an empty state."""
    trainer = Trainer(tiny(model={"dropout": 0.0}, train=EXACT), corpus)
    batch = trainer.order.batch(0)
    tokens, targets = batch.tokens.flatten(), batch.targets.flatten()
    total = torch.zeros((), dtype=torch.float64)
    bounds = batch.cu_seqlens.tolist()
    with torch.no_grad():
        for start, stop in pairwise(bounds):
            logits, _ = trainer.model(tokens[None, start:stop])
            total += F.cross_entropy(logits[0], targets[start:stop], reduction="sum")
    expected = total / (targets != -100).sum()
    assert trainer.update()["loss"] == pytest.approx(expected.item(), rel=1e-10)


def test_truncated_bptt_reads_documents_as_if_they_were_never_cut(tiny: Tiny, corpus: Corpus):
    trainer = Trainer(
        tiny(model={"dropout": 0.0}, optimizer={"lr": 1e-30}, train=EXACT | {"carry_state": True}),
        corpus,
    )
    lane = torch.cat([trainer.order.batch(step).tokens[0] for step in range(3)])
    for _ in range(3):
        trainer.update()
    begin = int((lane == 0).nonzero()[-1])  # the end token that begins the lane's last document
    _, expected = trainer.model(lane[None, begin:])
    assert trainer.state is not None
    assert trainer.state.positions[0] == len(lane) - begin > 32
    for mine, whole in zip(trainer.state.layers, expected.layers, strict=True):
        torch.testing.assert_close(mine["S"][:1], whole["S"])


def test_activation_checkpointing_changes_no_gradient(tiny: Tiny, corpus: Corpus):
    """Dropout included: the second pass draws what the first drew."""
    expected = gradients(Trainer(tiny(), corpus))
    found = gradients(Trainer(tiny(train={"checkpoint_layers": True}), corpus))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.parametrize("kind", ["retnet", "transformer"])
def test_both_models_train_in_float32_and_bfloat16(tiny: Tiny, corpus: Corpus, kind: str):
    losses = []
    for dtype in ("float32", "bfloat16"):
        trainer = Trainer(
            tiny(model={"kind": kind, "dropout": 0.0}, train={"dtype": dtype}), corpus
        )
        losses.append([trainer.update()["loss"] for _ in range(3)])
        assert all(p.dtype is torch.float32 for p in trainer.model.parameters())
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


def test_float16_is_refused(tiny: Tiny, corpus: Corpus):
    with pytest.raises(InputError, match="choose bfloat16"):
        Trainer(tiny(train={"dtype": "float16"}), corpus)


def test_a_transformer_carries_no_state(tiny: Tiny):
    with pytest.raises(InputError, match=r"train\.carry_state"):
        tiny(model={"kind": "transformer"}, train={"carry_state": True})


@pytest.mark.parametrize(("poison", "what"), [(float("nan"), "loss"), (1e25, "gradient")])
def test_what_is_not_finite_never_reaches_the_weights(
    tiny: Tiny, corpus: Corpus, poison: float, what: str
):
    trainer = Trainer(tiny(), corpus)
    trainer.update()
    with torch.no_grad():
        trainer.model.norm.weight[0] = poison  # pyright: ignore
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(Diverged, match=f"the {what} of step 2 is not finite.*--optimizer.lr"):
        trainer.update()
    assert trainer.step == 1
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) or name == "norm.weight"


@pytest.mark.parametrize("carry", [False, True])
def test_a_restored_trainer_makes_the_same_updates(
    tiny: Tiny, corpus: Corpus, tmp_path: Path, carry: bool
):
    config = tiny(train={"carry_state": carry})
    trainer = Trainer(config, corpus)
    for _ in range(2):
        trainer.update()
    trainer.save(tmp_path)
    expected = [trainer.update() for _ in range(3)]
    torch.manual_seed(99)
    restored = Trainer(config, corpus, tmp_path)
    restored.step = 2
    assert [restored.update() for _ in range(3)] == expected
    for mine, other in zip(restored.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(("kind", "seq_len"), [("retnet", 32), ("transformer", 10_000)])
def test_bits_per_byte_count_every_held_out_byte_once(
    tiny: Tiny, corpus: Corpus, kind: str, seq_len: int
):
    """Against each document alone: a RetNet's rows may cut it, a Transformer's hold it whole."""
    model = Trainer(tiny(model={"kind": kind}, train=EXACT), corpus).model.eval()
    nats, tokens = 0.0, 0
    for document in corpus.valid_documents():
        ids = torch.tensor([0, *corpus.tokenizer.encode(document.text).ids, 0])
        with torch.no_grad():
            logits, _ = model(ids[None, :-1])
        nats += F.cross_entropy(logits[0], ids[1:], reduction="sum").item()
        tokens += len(ids) - 1
    loss, bits = validate(model, corpus, batch_size=1, seq_len=seq_len, dtype=torch.float64)
    assert loss == pytest.approx(nats / tokens, rel=1e-9)
    assert bits == pytest.approx(nats / math.log(2) / corpus.valid.num_bytes, rel=1e-9)


@pytest.mark.parametrize("kind", ["retnet", "transformer"])
def test_rows_without_a_carried_state_are_validated_once_whatever_the_batch(
    tiny: Tiny, corpus: Corpus, kind: str
):
    """The last batch of three is filled up with rows of the next epoch, which do not count."""
    model = Trainer(tiny(model={"kind": kind, "dropout": 0.0}, train=EXACT), corpus).model
    seq_len = next(n for n in range(30, 40) if -(-corpus.valid.num_tokens // n) % 3)
    one, three = (
        validate(model, corpus, batch_size=rows, seq_len=seq_len, dtype=torch.float64, carry=False)
        for rows in (1, 3)
    )
    assert three == pytest.approx(one, rel=1e-12)
    carried = validate(model, corpus, batch_size=1, seq_len=seq_len, dtype=torch.float64)
    assert (carried == one) == (kind == "transformer")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_model_makes_the_same_updates(tiny: Tiny, corpus: Corpus):
    model = {"dropout": 0.0}
    plain = Trainer(tiny(model=model), corpus)
    compiled = Trainer(tiny(model=model, train={"compile": True}), corpus)
    expected, found = ([t.update()["loss"] for _ in range(3)] for t in (plain, compiled))
    assert found == pytest.approx(expected, rel=1e-4)
