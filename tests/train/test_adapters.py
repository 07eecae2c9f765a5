"""Fine-tuning of a model folder: all of its weights, LoRA, or the states that texts begin with."""

import json
import shutil
import signal
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file

import retentive
from retentive.adapters.loading import load_adapted
from retentive.data.dataset import prepare
from retentive.data.tokenizer import byte_tokenizer, save_tokenizer
from retentive.errors import InputError
from retentive.layers import cpu_training
from retentive.mixers.retention import Recomputing
from retentive.models.checkpoint import fingerprint, load, save_model
from retentive.models.retnet import RetNet
from retentive.models.transformer import Transformer
from retentive.train.checkpoints import RunFolder
from retentive.train.config import RunConfig
from retentive.train.loop import LEAVES, train
from retentive.train.metrics import read_metrics
from retentive.train.trainer import Trainer, batch_loss
from retentive.train.validate import validate

SIZES = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2}
KINDS = {
    "none": {},
    "lora": {"kind": "lora", "rank": 4, "dropout": 0.1},
    "state": {"kind": "state"},
}
Tune = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder to go on from."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    save_model(RetNet(zoo.retnet(**SIZES)), folder)
    save_tokenizer(byte_tokenizer(), folder)
    return folder


@pytest.fixture
def tune(table: dict[str, Any], base: Path) -> Tune:
    """`tune("lora", train={"steps": 3})`: the tiny run from `base`, with some keys changed."""
    del table["data"]["tokenizer"]

    def make(kind: str, **changes: dict[str, Any]) -> RunConfig:
        tables = table | {"model": {"base": str(base)}, "adapter": KINDS[kind]}
        return RunConfig.from_table({s: tables[s] | changes.get(s, {}) for s in tables})

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_the_held_out_loss_falls_and_the_base_stays(
    tune: Tune, base: Path, tmp_path: Path, kind: str
):
    before = (base / "model.safetensors").read_bytes()
    rate, fall = {"none": (3e-2, 2), "lora": (3e-2, 1.5), "state": (0.5, 0.3)}[kind]
    config = tune(kind, train={"steps": 40}, optimizer={"lr": rate})
    corpus = prepare(config.data)
    options = {"batch_size": 4, "seq_len": 32, "dtype": torch.float32}
    start, _ = validate(load(base), corpus, **options)
    result = train(config, tmp_path / "run", quiet=True)
    assert result.finished and result.valid_loss is not None
    assert result.valid_loss < start - fall
    if kind != "none":
        tuned, _ = validate(load_adapted(base, tmp_path / "run"), corpus, **options)
        assert tuned == pytest.approx(result.valid_loss, abs=1e-5)
    assert (base / "model.safetensors").read_bytes() == before
    sample = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert sample["sample"].startswith("def ")


@pytest.mark.parametrize("kind", ["lora", "state"])
def test_a_run_leaves_its_adapter_alone(tune: Tune, tmp_path: Path, kind: str):
    train(tune(kind), tmp_path / "run", quiet=True)
    checkpoint = RunFolder(tmp_path / "run").newest()
    assert checkpoint is not None
    for name in LEAVES[kind]:
        assert (checkpoint / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    names = {path.name for path in checkpoint.iterdir()}
    assert names == {*LEAVES[kind], "optimizer.safetensors", "run.json"}
    moments = load_file(checkpoint / "optimizer.safetensors")
    trained = [name for name in moments if name.startswith("exp_avg.")]
    matrices = 2 * 2 * (5 + 2)  # of 2 layers with 5 projections and an FFN of 2, an A and a B each
    assert len(trained) == {"lora": matrices, "state": 2}[kind]
    if kind == "state":
        [states] = load_file(tmp_path / "run" / LEAVES[kind][0]).values()
        assert (states.shape, states.dtype) == ((2, 2, 8, 16), torch.float32)


@pytest.mark.parametrize("kind", ["lora", "state"])
@pytest.mark.parametrize("changes", [{}, {"carry_state": True, "micro_batch": 3}])
def test_a_stopped_run_goes_on_bit_for_bit(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, changes: dict[str, Any]
):
    config = tune(kind, train=changes)
    train(config, tmp_path / "whole", quiet=True)
    update = Trainer.update

    def stop(self: Trainer) -> dict[str, float]:
        result = update(self)
        if self.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", stop)
        assert train(config, tmp_path / "cut", quiet=True).step == 3
    assert train(config, tmp_path / "cut", resume=True, quiet=True).finished
    runs = [tmp_path / "whole", tmp_path / "cut"]
    values, again = (load_file(run / LEAVES[kind][-1]) for run in runs)
    assert all(torch.equal(again[name], value) for name, value in values.items())
    assert any(value.any() for value in values.values())
    losses = [
        [r["loss"] for r in read_metrics(run / "metrics.jsonl") if "loss" in r] for run in runs
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("carry", [False, True])
def test_documents_begin_with_the_tuned_state_wherever_they_lie(tune: Tune, carry: bool):
    """Each document of a step alone, but those that go on from the step before."""
    trained = {"dtype": "float64", "carry_state": carry}
    config = tune("state", train=trained, optimizer={"lr": 1e-30})
    trainer = Trainer(config, prepare(config.data))
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    trainer.update()
    batch, before = trainer.order.batch(1), trainer.state
    total, flat = 0.0, batch.tokens.flatten()
    bounds = batch.cu_seqlens.tolist()
    for start, stop in pairwise(bounds):
        row, at = divmod(start, 32)
        goes_on = before is not None and at == 0 and bool(batch.continues[row])
        state = before.select([row]) if goes_on and before is not None else None
        h, _ = trainer.model.hidden(flat[None, start:stop], state)
        targets = batch.targets.flatten()[start:stop]
        total += trainer.model.loss(h[0], targets, reduction="sum").item()
    tokens = int((batch.targets != -100).sum())
    assert trainer.update()["loss"] == pytest.approx(total / tokens, rel=1e-10)
    assert bool(batch.continues.any()) == carry


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["lora", "state"])
def test_gradients_of_the_fast_path_are_those_of_plain_torch(
    tune: Tune, monkeypatch: pytest.MonkeyPatch, kind: str, checkpointed: bool
):
    """float32 with frozen weights, what is computed again included, against float64 without."""
    changes = {"adapter": {"dropout": 0.0}} if kind == "lora" else {}
    config = tune(kind, train={"checkpoint_layers": checkpointed, "seq_len": 64}, **changes)
    corpus = prepare(config.data)
    fast = Trainer(config, corpus)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in fast.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    slow = Trainer(tune(kind, train={"dtype": "float64", "seq_len": 64}, **changes), corpus)
    slow.model.load_state_dict({k: v.double() for k, v in fast.model.state_dict().items()})
    for module in slow.model.modules():
        if isinstance(module, Recomputing):
            module.recompute = False
    rows = []
    plain = cpu_training.product
    monkeypatch.setattr(cpu_training, "product", lambda x, *w: rows.append(len(x)) or plain(x, *w))
    found, exact = (gradients(trainer) for trainer in (fast, slow))
    assert max(rows) == 4 * 64  # only float32 takes that path
    with monkeypatch.context() as patch:
        patch.setattr(cpu_training, "suits_onednn", lambda x: False)
        reference = gradients(fast)
    errors = [error(gradient, exact) for gradient in (found, reference)]
    assert errors[0] < 2 * errors[1] + 1e-6


def gradients(trainer: Trainer) -> torch.Tensor:
    """Of a batch's loss, all that is trained as one vector."""
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    loss, _ = batch_loss(trainer.model, trainer.order.batch(0), None)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]).double()


def error(given: torch.Tensor, exact: torch.Tensor) -> float:
    return float((given - exact).norm() / exact.norm())


def test_a_resume_on_another_base_is_refused(tune: Tune, base: Path, tmp_path: Path):
    copy = shutil.copytree(base, tmp_path / "base")
    config = tune("state", model={"base": str(copy)}, train={"steps": 2})
    train(config, tmp_path / "run", quiet=True)
    torch.manual_seed(1)
    save_model(RetNet(zoo.retnet(**SIZES)), copy)
    again = tune("state", model={"base": str(copy)}, train={"steps": 3})
    with pytest.raises(InputError, match="trained on another model, or on other weights"):
        train(again, tmp_path / "run", resume=True, quiet=True)


def test_a_resume_with_another_adapter_is_refused(tune: Tune, tmp_path: Path):
    train(tune("lora"), tmp_path / "run", quiet=True)
    with pytest.raises(InputError, match=r"cannot resume .*: adapter\.rank was 4 and is 5"):
        train(tune("lora", adapter={"rank": 5}), tmp_path / "run", resume=True, quiet=True)


def test_fine_tuning_keeps_the_tokenizer_and_the_model(tune: Tune, base: Path, tmp_path: Path):
    assert train(tune("none", train={"steps": 2}), tmp_path / "run", quiet=True).finished
    tuned, tokenizer = retentive.load(tmp_path / "run"), retentive.load_tokenizer(tmp_path / "run")
    assert tuned.config == load(base).config
    assert fingerprint(tuned) != fingerprint(load(base))
    assert tokenizer.get_vocab() == retentive.load_tokenizer(base).get_vocab()


def test_a_transformer_takes_lora_and_has_no_state(tune: Tune, tmp_path: Path):
    save_model(Transformer(zoo.transformer(**SIZES)), tmp_path / "t")
    save_tokenizer(byte_tokenizer(), tmp_path / "t")
    changes = {"model": {"base": str(tmp_path / "t")}, "train": {"steps": 2}}
    assert train(tune("lora", **changes), tmp_path / "run", quiet=True).finished
    with pytest.raises(InputError, match=r"state tuning needs retention.*adapter\.kind = \"lora\""):
        tune("state", **changes)


@pytest.mark.parametrize(
    ("kind", "changes", "complaint"),
    [
        ("lora", {"model": {"hidden_size": 8}}, "model.base is a whole model; leave out model.hid"),
        ("lora", {"model": {"kind": "transformer"}}, "model.base is a whole model; leave out mod"),
        ("lora", {"model": {"base": "nowhere"}}, "no file or folder nowhere"),
        ("lora", {"data": {"tokenizer": "bpe"}}, "knows its own; leave it out"),
        ("state", {"adapter": {"rank": 4}}, 'adapter.rank belongs to kind = "lora"'),
        ("lora", {"adapter": {"rank": 0}}, "adapter.rank is 0; it must be at least 1"),
        (
            "lora",
            {"adapter": {"dropout": 1.0}},
            "adapter.dropout is 1.0; it is at least 0, below 1",
        ),
        ("lora", {"adapter": {"kind": "prefix"}}, "it must be 'none', 'lora' or 'state'"),
    ],
)
def test_mistakes_in_the_config(
    tune: Tune, kind: str, changes: dict[str, dict[str, Any]], complaint: str
):
    with pytest.raises(InputError) as caught:
        tune(kind, **changes)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_adapter_needs_a_base(table: dict[str, Any]):
    with pytest.raises(InputError, match=r"adapter\.kind is lora, but there is no model to adapt"):
        RunConfig.from_table(table | {"adapter": {"kind": "lora"}})


@pytest.fixture
def no_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is refused before the corpus is read."""
    monkeypatch.setattr("retentive.train.loop.prepare", None)


@pytest.mark.usefixtures("no_corpus")
def test_a_target_that_the_model_has_not(tune: Tune, tmp_path: Path):
    config = tune("lora", adapter={"targets": ["q_prj"]})
    with pytest.raises(InputError, match=r"'q_prj' \(did you mean 'q_proj'\?\); this model has do"):
        train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_only_the_targets_are_trained(tune: Tune, tmp_path: Path):
    config = tune("lora", adapter={"targets": ["q_proj", "lm_head"]}, train={"steps": 2})
    train(config, tmp_path / "run", quiet=True)
    names = load_file(tmp_path / "run" / "adapter_model.safetensors").keys()
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == {"q_proj", "lm_head"}
    fields = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert fields["target_modules"] == ["lm_head", "q_proj"]


@pytest.mark.usefixtures("no_corpus")
def test_without_peft(tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r'LoRA takes PEFT: pip install "retentive\[hf\]"'):
        train(tune("lora"), tmp_path / "run", quiet=True)


def test_a_quantised_base_is_refused(tune: Tune, base: Path, tmp_path: Path):
    from retentive.compress.quantize import quantize

    save_model(quantize(load(base), 8), tmp_path / "small")
    with pytest.raises(InputError, match="quantised; give the model it was made from"):
        tune("lora", model={"base": str(tmp_path / "small")})


def test_a_tokenizer_too_large_for_the_base(tune: Tune, base: Path, tmp_path: Path):
    save_model(RetNet(zoo.retnet(**SIZES | {"vocab_size": 200})), tmp_path / "small")
    save_tokenizer(byte_tokenizer(), tmp_path / "small")
    config = tune("none", model={"base": str(tmp_path / "small")})
    with pytest.raises(InputError, match=r"the tokenizer has 257 entries, the model in .* 200"):
        train(config, tmp_path / "run", quiet=True)


@pytest.mark.parametrize("kind", ["lora", "state"])
def test_every_dtype(tune: Tune, kind: str):
    """bfloat16 is the products' only: what is trained is float32, as are states."""
    corpus, losses = prepare(tune(kind).data), {}
    for dtype in ("float64", "float32", "bfloat16"):
        trainer = Trainer(tune(kind, train={"dtype": dtype}), corpus)
        exact = torch.float64 if dtype == "float64" else torch.float32
        assert {p.dtype for p in trainer.model.parameters()} == {exact}
        losses[dtype] = trainer.update()["loss"]
    assert losses["float32"] == pytest.approx(losses["float64"], rel=1e-5)
    assert losses["bfloat16"] == pytest.approx(losses["float64"], rel=0.02)
