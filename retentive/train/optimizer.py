"""AdamW as the paper trains: which parameters decay, and the learning rate of each step."""

import math

import torch
from torch import Tensor, nn

from retentive.models.language_model import LanguageModel
from retentive.train.config import OptimizerConfig


def parameter_groups(model: LanguageModel, weight_decay: float) -> list[dict]:
    """Two groups of what is trained: matrices decay; norms, biases and states do not, nor do the
    matrices that a mixer names (`Mixer.undecayed`).
    """
    spared = {id(p) for block in model.blocks for p in block.mixer.undecayed()}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim == 2 and id(p) not in spared]
    there = {id(p) for p in decayed}
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in there], "weight_decay": 0.0},
    ]


def build_optimizer(model: LanguageModel, config: OptimizerConfig) -> torch.optim.AdamW:
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of update `step` (0-based) out of `steps`.

    It grows by lr / warmup an update up to lr, then falls in a line, along half a cosine, or not at
    all, towards `final_lr` · lr, which update `steps` would have: the last one still moves the
    weights.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    past = (step - config.warmup) / (steps - config.warmup)
    left = {
        "linear": 1 - past,
        "cosine": (1 + math.cos(math.pi * past)) / 2,
        "constant": 1.0,
    }[config.schedule]
    return config.lr * (config.final_lr + (1 - config.final_lr) * left)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name, `exp_avg.lm_head.weight` and so on."""
    return {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for key, value in optimizer.state[parameter].items()
    }


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`: the same state for the same parameters."""
    parameters = dict(model.named_parameters())
    for key_and_name, value in tensors.items():
        key, name = key_and_name.split(".", 1)
        optimizer.state[parameters[name]][key] = value.to(parameters[name].device)
