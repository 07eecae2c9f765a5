"""The decays γ of multi-scale retention and the row scale: the one place that computes either.

Everything is in natural-log space and float64; callers cast.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from retentive.errors import InputError, nearest

RULES = ("power", "linspace")


def log_decay(num_heads: int, rule: str | Sequence[float] = "power") -> Tensor:
    """log γ of each head, float64 `[H]`.

    `rule` is "power" (γ = 1 - 2^(-5-h), paper §2.2), "linspace" (paper §3.1:
    γ = 1 - exp(linspace(log 1/32, log 1/512, H))), or the H values of log γ themselves, each ≤ 0
    (0 is no decay). Exact for any H: γ itself is never formed.
    Always on the CPU, whatever the default device: models are built on the meta device.
    """
    if rule == "power":
        return torch.log1p(
            -torch.exp2(-5.0 - torch.arange(num_heads, dtype=torch.float64, device="cpu"))
        )
    if rule == "linspace":
        exponents = torch.linspace(
            math.log(1 / 32), math.log(1 / 512), num_heads, dtype=torch.float64, device="cpu"
        )
        return torch.log1p(-torch.exp(exponents))
    if isinstance(rule, str):
        raise InputError(
            f"unknown decay rule {rule!r}{nearest(rule, RULES)}; "
            f"choose {', '.join(RULES)} or a list of log decays"
        )
    values = torch.tensor(list(rule), dtype=torch.float64, device="cpu")
    if values.shape != (num_heads,):
        raise InputError(
            f"decay lists {values.numel()} log decays for {num_heads} heads; give one per head"
        )
    if not bool((values <= 0).all()):
        raise InputError(
            "decay lists a log decay that is not ≤ 0; give the natural log of γ, 0 for no decay"
        )
    return values


def row_scale(log_decay: Tensor, positions: Tensor) -> Tensor:
    """1/√(Σ_{i≤n} γ^i) at integer positions n `[...]`, float64 `[...,H]` (paper §2.1).

    The sum is (γ^(n+1) - 1)/(γ - 1), written with expm1 so that γ near 1 keeps its digits; at γ = 1
    it is n + 1.
    """
    rate = log_decay.to(torch.float64)
    count = (positions + 1).to(torch.float64).unsqueeze(-1)
    undecayed = rate == 0
    safe = torch.where(undecayed, -torch.ones_like(rate), rate)
    total = torch.where(undecayed, count, torch.expm1(count * safe) / torch.expm1(safe))
    return total.rsqrt()


def half_life(log_decay: Tensor) -> Tensor:
    """Tokens after which a head's memory has halved, float64 `[H]`; infinite where γ = 1."""
    return math.log(2) / log_decay.to(torch.float64).abs()
