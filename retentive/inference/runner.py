"""One token more for each row of a batch, again and again: the weights read once a token.

`DecodeRunner` is RetNet's. Its state has a fixed size, so it is updated where it lies, and the
angles of the next positions are computed some at a time. `ModelRunner` serves any other model.
"""

import time
from typing import Protocol, cast

import torch
from torch import Tensor

from retentive.inference.steps import BlockStep, Mix, RetentionStep
from retentive.models.language_model import LanguageModel
from retentive.models.layers import MultiScaleRetention
from retentive.models.retnet import RetNet, RetNetBlock
from retentive.models.state import RetNetState

AHEAD = 32  # positions whose angles are computed at once


class Runner(Protocol):
    """Tokens in, logits out; the state between them is the runner's."""

    @property
    def state(self) -> RetNetState:
        """After the tokens so far; the next step may change it (`clone` it to keep it)."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Logits `[B,vocab]` after one more token a row, `[B]`."""
        ...


def runner(model: LanguageModel, state: RetNetState) -> Runner:
    """Goes on from `state`, which stays as it is."""
    if isinstance(model, RetNet) and not model.config.attention_layers:
        from retentive.inference.graphs import GraphRunner, suits  # they are runners, too

        if state.batch_size and suits(model):  # a session whose texts have ended has no rows
            return GraphRunner(model, state)
        return DecodeRunner(model, state.clone())
    return ModelRunner(model, state)


class ModelRunner:
    """By the model's own calls."""

    def __init__(self, model: LanguageModel, state: RetNetState):
        self.model, self.state = model, state

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        hidden, state = self.model.hidden(tokens[:, None], self.state)
        assert state is not None
        self.state = state
        return self.model.head(hidden[:, -1])


class DecodeRunner:
    """A RetNet's recurrent form, `state` updated in place. As it is or packed (`pack_`)."""

    ahead = AHEAD

    @torch.inference_mode()
    def __init__(self, model: RetNet, state: RetNetState):
        self.model, self.state = model, state
        blocks = cast(list[RetNetBlock], list(model.layers))
        self._blocks = [BlockStep(block, self._mix(block.retention)) for block in blocks]
        decays = (block.retention.state_decay.unsqueeze(-1) for block in blocks)
        self._gammas = [decay.to(model.device, model.exact_dtype) for decay in decays]
        self._angles: list[tuple[Tensor, Tensor]] = []  # of the positions to come, the next last

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        x = self.model.embed(tokens)
        cos, sin = self._next_angles()
        layers = zip(self._blocks, self.state.layers, self._gammas, strict=True)
        for block, layer_state, gamma in layers:
            x = block(x, layer_state.S, gamma, cos, sin)
        self.state.positions.add_(1)
        return self.model.head(self.model.norm(x))

    def _mix(self, retention: MultiScaleRetention) -> Mix:
        """What a step does in the place of a layer's retention."""
        return RetentionStep(retention)

    def _next_angles(self) -> tuple[Tensor, Tensor]:
        """Of queries and keys `[B,2,H|1,K]` at the position of each row."""
        if not self._angles:
            ahead = torch.arange(self.ahead, device=self.model.device)
            angles = self.model.angles(self.state.positions[:, None] + ahead)
            queries, keys = (angles.cos, angles.sin), (angles.key_cos, angles.key_sin)
            cos, sin = (
                torch.stack((q, k.expand_as(q)), 2).unbind(1)
                for q, k in zip(queries, keys, strict=True)
            )
            self._angles = list(zip(cos, sin, strict=True))[::-1]
        return self._angles.pop()


def fastest_threads(model: RetNet, rows: int) -> int:
    """How many CPU threads decode `rows` texts fastest: small products are soon shared too far.

    Tries half as many for as long as that is faster, beginning with torch's present number. A
    RetNet's logits are the same to the last bit with any number; attention's are not.
    """
    allowed = best = torch.get_num_threads()
    decoding, tokens = runner(model, model.init_state(rows)), torch.zeros(rows, dtype=torch.int64)
    try:
        fewest = _step_seconds(decoding, tokens)
        while best > 1:
            torch.set_num_threads(best // 2)
            seconds = _step_seconds(decoding, tokens)
            if seconds >= fewest:
                break
            best, fewest = best // 2, seconds
        return best
    finally:
        torch.set_num_threads(allowed)


def _step_seconds(decoding: Runner, tokens: Tensor) -> float:
    """The best of four steps, the first of which warms up."""
    times = []
    for _ in range(4):
        began = time.perf_counter()
        decoding.step(tokens)
        times.append(time.perf_counter() - began)
    return min(times[1:])
