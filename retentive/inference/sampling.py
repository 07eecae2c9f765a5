"""From logits to the next token: greedy, or a draw among what top-k, top-p and min-p leave.

Each row draws from a generator of its own, so a row's text is the same whatever rows stand beside
it. The generators are on the CPU: a seed gives the same draws on every device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retentive.errors import InputError

_NUCLEUS = 1024  # top-p looks among so many tokens before it sorts a whole vocabulary


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The options apply in the order in which they are listed."""

    repetition_penalty: float = 1.0
    """Divides positive logits of tokens already in the text, multiplies negative ones; 1 = off."""
    temperature: float = 0.8
    """Divides the logits; 0 is greedy: always the likeliest token."""
    top_k: int | None = None
    """Keep the k likeliest tokens."""
    top_p: float = 0.95
    """Keep the fewest likeliest tokens that hold this much probability; 1 = all."""
    min_p: float = 0.0
    """Drop tokens less likely than this fraction of the likeliest; 0 = none."""
    seed: int = 0
    """Row r draws from seed + r."""

    def __post_init__(self) -> None:
        for ok, name, allowed in (
            (self.repetition_penalty > 0, "repetition_penalty", "above 0 (1 turns it off)"),
            (self.temperature >= 0, "temperature", "0 (greedy) or above"),
            (self.top_k is None or self.top_k >= 1, "top_k", "1 or more"),
            (0 < self.top_p <= 1, "top_p", "above 0 and at most 1 (1 turns it off)"),
            (0 <= self.min_p <= 1, "min_p", "from 0 to 1 (0 turns it off)"),
            (0 <= self.seed < 2**63, "seed", "from 0 to 2^63 - 1"),
        ):
            value = getattr(self, name)
            if not ok or value in (math.inf, -math.inf):
                raise InputError(f"{name} is {value}; give a number {allowed}")


class Sampler:
    """The rows' generators and the tokens each row has seen. `rows` below are indices into them."""

    def __init__(
        self, sampling: Sampling, rows: int, vocab_size: int, device: torch.device
    ) -> None:
        self.sampling = sampling
        self.generators = [_generator(sampling.seed + row) for row in range(rows)]
        self.seen = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device)

    def observe(self, row: int, tokens: Sequence[int]) -> None:
        """`tokens` are part of row `row`'s text, though they were not drawn."""
        self.seen[row, torch.tensor(tokens, dtype=torch.int64, device=self.seen.device)] = True

    def draw(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """The next token of each of `rows` (int64 `[R]`) from its logits `[R, vocab]`."""
        logits = logits.float()
        if not math.isfinite(float(logits.sum())):
            raise InputError(
                "the model's logits are not finite: its weights are broken, or --dtype has too "
                "small a range for them (try float32)"
            )
        index = torch.tensor(rows, dtype=torch.int64, device=logits.device)
        exact: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults
        uniform = torch.zeros(len(rows), 1, **exact)
        if self.sampling.temperature > 0:
            drawn = [torch.rand(1, 1, generator=self.generators[r], **exact) for r in rows]
            uniform = torch.cat(drawn)
        tokens = choose(logits, self.sampling, self.seen[index], uniform.to(logits.device))
        self.seen[index, tokens] = True
        return tokens

    def tensors(self) -> dict[str, Tensor]:
        """What `restore` needs to go on drawing as this sampler would."""
        generators = torch.stack([generator.get_state() for generator in self.generators])
        return {"generators": generators, "seen": self.seen}

    def restore(self, tensors: dict[str, Tensor], *, draws: bool) -> None:
        """What was seen, and where the draws stood unless these start anew (`draws` False)."""
        self.seen.copy_(tensors["seen"])
        if draws:
            for generator, state in zip(self.generators, tensors["generators"], strict=True):
                generator.set_state(state.clone())  # it wants memory of its own


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def choose(logits: Tensor, sampling: Sampling, seen: Tensor, uniform: Tensor) -> Tensor:
    """One token a row, int64 `[R]`: the one at which the cumulative probability passes `uniform`.

    logits float32 `[R, vocab]`, seen bool `[R, vocab]` (the tokens to penalise), uniform `[R, 1]`
    in [0, 1).
    """
    penalty = sampling.repetition_penalty
    if penalty != 1:
        weakened = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, weakened, logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # The likeliest becomes 0 first, so that no temperature can overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    probabilities, order = _candidates(logits, sampling)
    if sampling.min_p > 0:
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    # Rounding up must not reach the total: beyond it no token is left.
    passed = torch.minimum(uniform * total, total * (1 - 2**-22))
    choice = torch.searchsorted(cumulative, passed, right=True)
    return (choice if order is None else order.gather(-1, choice)).squeeze(-1)


def _candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Probabilities `[R, n]` of the tokens that top-k and top-p leave (0: dropped), and their ids.

    The ids are None where there is nothing to drop: then the columns are the vocabulary. Top-p is
    of what top-k has left. Sorting a vocabulary costs far more than the likeliest few: top-p looks
    among those first.
    """
    vocab_size = logits.shape[-1]
    if sampling.top_k is not None:
        logits, order = logits.topk(min(sampling.top_k, vocab_size))
        probabilities = logits.softmax(-1)
    elif sampling.top_p < 1:
        probabilities, order = logits.softmax(-1).topk(min(_NUCLEUS, vocab_size))
        if float(probabilities.sum(-1).min()) < sampling.top_p:
            probabilities, order = logits.softmax(-1).sort(descending=True)
    else:
        return logits.softmax(-1), None
    if sampling.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0)
    return probabilities, order
