"""Trainer and PEFT: they train, save, resume and merge."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import retentive.hf  # noqa: F401
from retentive.errors import InputError
from retentive.mixers.retention import Recomputing
from retentive.models.checkpoint import load

pytestmark = pytest.mark.filterwarnings(  # PEFT asks the newest transformers by an old name
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


class Texts(Dataset):
    """Rows of 8 tokens that count up; of every other row the first half is a prompt."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.arange(1, 9) + 3 * (index % 4)
        labels = tokens.clone()
        if index % 2:
            labels[:4] = -100
        return {"input_ids": tokens, "labels": labels, "attention_mask": torch.ones(8).long()}


def trainer(model, out: Path, **options) -> Trainer:
    arguments = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 3}
    arguments |= {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
    arguments |= {"save_strategy": "no"} | options
    return Trainer(model, TrainingArguments(out, **arguments), train_dataset=Texts())


def losses(trained: Trainer) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def same_weights(first, second) -> bool:
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("folder", ["retnet", "hybrid"], indirect=True)
def test_a_resumed_run_is_the_run_without_the_stop(folder, tmp_path) -> None:
    """Bit by bit, from one of its checkpoints; and a checkpoint is a folder of ours."""
    options = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "run", **options)
    whole.train()
    assert losses(whole)[-1] < 0.8 * losses(whole)[0]
    for checkpoint in ("checkpoint-3", "checkpoint-6"):
        assert load(tmp_path / "run" / checkpoint).config == load(folder).config
    assert same_weights(load(tmp_path / "run" / "checkpoint-6"), whole.model)
    resumed = trainer(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "again", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    assert same_weights(resumed.model, whole.model)


def test_accumulated_gradients_weigh_every_token_alike(make_folder, tmp_path) -> None:
    """A step of 4 rows is the same step with 2 or 1 at a time, up to rounding."""
    folder, made = make_folder("retnet"), []
    for rows in (4, 2, 1):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        split = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 4 // rows}
        run = trainer(model, tmp_path, optim="sgd", max_steps=3, **split)
        run.train()
        made.append((losses(run), torch.cat([w.detach().flatten() for w in model.parameters()])))
    for given, weights in made[1:]:
        assert given == pytest.approx(made[0][0], rel=1e-6)  # as Trainer's float32 sums of losses
        assert (weights - made[0][1]).abs().max() < 1e-10


def test_evaluation(make_folder, tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_folder("retnet"))
    run = trainer(model, tmp_path, per_device_eval_batch_size=5)
    batch = [Texts()[i] for i in range(0, 14, 2)]
    told = run.evaluate(batch)["eval_loss"]
    rows = {key: torch.stack([row[key] for row in batch]) for key in batch[0]}
    assert told == pytest.approx(model(**rows).loss.item(), rel=1e-5)
    predicted = run.predict(batch).predictions
    assert torch.allclose(torch.from_numpy(predicted), model(**rows).logits, atol=1e-5)


def test_smoothed_labels_are_those_of_the_next_tokens(make_folder, tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_folder("retnet")).eval()
    run = trainer(model, tmp_path, label_smoothing_factor=1e-9)
    batch = {key: torch.stack([Texts()[i][key] for i in range(4)]) for key in Texts()[0]}
    expected = model(**batch).loss.item()
    assert run.compute_loss(model, batch).item() == pytest.approx(expected, rel=1e-5)


def test_data_parallel_is_refused(make_folder) -> None:
    """Its replicas would compute with the weights on the first GPU."""
    model = AutoModelForCausalLM.from_pretrained(make_folder("retnet"))
    with pytest.raises(InputError, match=r"torchrun.*CUDA_VISIBLE_DEVICES=0"):
        model._replicate_for_data_parallel()


@pytest.mark.parametrize("folder", ["retnet-tied", "hybrid"], indirect=True)
def test_lora_trains_saves_and_merges(folder, tokens, tmp_path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder)
    before = base(tokens).logits
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    adapters = [name for name, _ in model.named_parameters() if ".lora_A." in name]
    projections = [name for name, _ in load(folder).named_parameters() if "_proj.weight" in name]
    assert len(adapters) == len(projections)
    run = trainer(model, tmp_path, max_steps=3)
    run.train()
    adapted = model.eval()(tokens).logits
    assert not torch.allclose(adapted, before, atol=1e-3)
    model.save_pretrained(tmp_path / "adapter")

    fresh = AutoModelForCausalLM.from_pretrained(folder)
    opened = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.equal(opened(tokens).logits, adapted)
    with opened.disable_adapter():
        assert torch.equal(opened(tokens).logits, before)
    opened.merge_adapter()
    assert torch.allclose(opened(tokens).logits, adapted, atol=1e-5)
    opened.unmerge_adapter()
    assert torch.allclose(opened(tokens).logits, adapted, atol=1e-5)
    merged = opened.merge_and_unload()
    assert type(merged) is type(base)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.allclose(load(tmp_path / "merged")(tokens)[0], adapted, atol=1e-5)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_dropout_in_adapters(make_folder, tokens, checkpointed) -> None:
    """What is computed a second time in the backward draws what it drew the first time."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(make_folder("retnet"), dtype=torch.float64)
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(base, lora).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = []
    for recompute in (False, True):
        base.retentive.checkpoint_layers = recompute and checkpointed
        for module in base.modules():
            if isinstance(module, Recomputing):
                module.recompute = recompute and not checkpointed
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(model(tokens, labels=tokens).loss, weights))
    for plain, recomputed in zip(*gradients, strict=True):
        assert (plain - recomputed).abs().max() < 1e-12
    assert any(gradient.any() for gradient in gradients[0])


@pytest.mark.parametrize("kind", ["lora", "whole"])
def test_an_adapted_head_counts_in_the_loss(make_folder, tokens, kind) -> None:
    base = AutoModelForCausalLM.from_pretrained(make_folder("retnet"), dtype=torch.float64)
    head = {"modules_to_save": ["lm_head"]} if kind == "whole" else {}
    targets = ["q_proj"] if kind == "whole" else ["lm_head", "embed_tokens"]
    lora = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **head)
    model = get_peft_model(base, lora).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "modules_to_save" in name:
                weight.mul_(2)
    given = model(tokens, labels=tokens)
    logits = given.logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
    assert (given.loss - expected).abs() < 1e-12
