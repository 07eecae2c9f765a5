"""The learning rate of each step, and which parameters decay."""

import pytest
import torch
import zoo

from retentive.models.retnet import RetNet
from retentive.train.config import OptimizerConfig
from retentive.train.optimizer import (
    build_optimizer,
    learning_rate,
    optimizer_tensors,
    parameter_groups,
    restore_optimizer,
)

MODEL = zoo.retnet(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_heads=2)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.25, 0.5, 0.75, 1, 1, 0.825, 0.65, 0.475]),
        ("cosine", [0.25, 0.5, 0.75, 1, 1, 0.89749, 0.65, 0.40251]),
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
    ],
)
def test_the_rate_grows_then_falls(schedule: str, expected: list[float]):
    config = OptimizerConfig(lr=2.0, warmup=4, schedule=schedule, final_lr=0.3)  # pyright: ignore
    rates = [learning_rate(config, step, steps=8) / 2 for step in range(8)]
    assert rates == pytest.approx(expected, abs=1e-5)


def test_a_run_shorter_than_its_warmup_only_warms_up():
    config = OptimizerConfig(lr=1.0, warmup=10)
    assert [learning_rate(config, step, steps=3) for step in range(3)] == [0.1, 0.2, 0.3]


def test_without_warmup_the_first_step_has_the_whole_rate():
    assert learning_rate(OptimizerConfig(lr=1.0, warmup=0), 0, steps=10) == 1.0


def test_norms_do_not_decay_and_everything_else_does():
    model = RetNet(MODEL)
    decaying, still = parameter_groups(model, 0.05)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert decaying["weight_decay"] == 0.05
    assert still["weight_decay"] == 0
    assert {names[p] for p in still["params"]} == {
        f"{part}.{kind}"
        for part in ("layers.0.retention_norm", "layers.0.ffn_norm", "norm")
        for kind in ("weight", "bias")
    }
    assert len(decaying["params"]) + len(still["params"]) == len(names)


def test_a_restored_optimizer_makes_the_same_updates():
    model = RetNet(MODEL)
    optimizer = build_optimizer(model, OptimizerConfig())
    step(model, optimizer, seed=0)
    twin = RetNet(MODEL)
    twin.load_state_dict(model.state_dict())
    restored = build_optimizer(twin, OptimizerConfig())
    tensors = optimizer_tensors(model, optimizer)
    restore_optimizer(twin, restored, {name: tensor.clone() for name, tensor in tensors.items()})
    for seed in (1, 2):
        step(model, optimizer, seed)
        step(twin, restored, seed)
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other)


def step(model: RetNet, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
