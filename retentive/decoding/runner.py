"""One token more for each row of a batch, again and again: the weights read once a token.

A RetNet's state has a fixed size, so it is updated where it lies, and the angles of the next
positions are computed some at a time. On a CPU a step is a program (`inference.program`), on a GPU
a recording (`inference.graphs`), and elsewhere `DecodeRunner`'s. `ModelRunner` serves other models.
"""

import time
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor

from retentive.layers.layout import rotate
from retentive.mixers.retention import MultiScaleRetention
from retentive.models.language_model import LanguageModel
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
    """The fastest there is for the model. Goes on from `state`, which stays as it is."""
    from retentive.decoding import graphs, program  # they are runners, too

    if not isinstance(model, RetNet) or model.config.attention_layers:
        return ModelRunner(model, state)
    if state.batch_size and graphs.suits(model):  # a session whose texts have ended has no rows
        return graphs.GraphRunner(model, state)
    kind = program.ProgramRunner if program.suits(model) else DecodeRunner
    return kind(model, state.clone())


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
    """A RetNet's recurrent form in torch's operations, `state` updated in place."""

    ahead = AHEAD

    @torch.inference_mode()
    def __init__(self, model: RetNet, state: RetNetState):
        self.model, self.state = model, state
        self._mixes = [self._mix(block.retention) for block in retnet_blocks(model)]
        self._gammas = [gamma.unsqueeze(-1) for gamma in decays(model)]
        self._angles = AnglesAhead(model, self.ahead)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        x = self.model.embed(tokens)
        angles = self._angles.next(self.state.positions)
        layers = zip(
            retnet_blocks(self.model), self._mixes, self._gammas, self.state.layers, strict=True
        )
        for block, mix, gamma, layer in layers:
            step = partial(mix, S=layer.S, gamma=gamma, angles=angles)
            x, _ = block.around(x, lambda h, step=step: (step(h), None))
        self.state.positions.add_(1)
        return self.model.head(self.model.norm(x))

    def _mix(self, retention: MultiScaleRetention) -> "Mix":
        """What a step does in the place of a layer's retention."""
        return partial(retain, retention)


class Mix(Protocol):
    def __call__(
        self, h: Tensor, *, S: Tensor, gamma: Tensor, angles: tuple[Tensor, Tensor]
    ) -> Tensor:
        """h `[B,D]` -> y `[B,D]`; S `[B,H,K,V]` is updated in place.

        gamma `[H,1|K,1]`; angles: cos and sin `[B,2,H|1,K]`, of queries and keys.
        """
        ...


def retain(
    layer: MultiScaleRetention,
    h: Tensor,
    *,
    S: Tensor,
    gamma: Tensor,
    angles: tuple[Tensor, Tensor],
) -> Tensor:
    """A `Mix`: S ← γ S + kᵀ v, o = q S (paper §2.2). With xPos γ is that of a channel."""
    _, K, V = layer.state_shape
    q, k, v, gate = layer.project(h)
    q, k, v = (y.unflatten(-1, (-1, n)) for y, n in ((q, K), (k, K), (v, V)))
    pairs = torch.stack((q, layer.share(k)), 1).to(S.dtype)
    q, k = rotate(pairs, *angles).unbind(1)
    v = layer.share(v).to(S.dtype)
    S.mul_(gamma).addcmul_(k.unsqueeze(-1), v.unsqueeze(-2))
    o = torch.bmm(q.flatten(0, 1).unsqueeze(1), S.flatten(0, 1)).view(v.shape)
    return layer.output(o.to(h.dtype), gate)


class AnglesAhead:
    """The angles of the positions to come, computed some at a time."""

    def __init__(self, model: RetNet, count: int):
        self._model, self._count = model, count
        self._angles: list[tuple[Tensor, Tensor]] = []  # the next last

    def next(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin `[B,2,H|1,K]`, of queries and keys, at `positions` `[B]`.

        Which are those of the last call and one more.
        """
        if not self._angles:
            tables = self.table(self._model, positions, self._count)
            cos, sin = (table.unbind(1) for table in tables)
            self._angles = list(zip(cos, sin, strict=True))[::-1]
        return self._angles.pop()

    @staticmethod
    def table(model: RetNet, positions: Tensor, count: int) -> tuple[Tensor, ...]:
        """cos and sin `[B,count,2,H|1,K]` from `positions` on."""
        ahead = torch.arange(count, device=positions.device)
        angles = model.angles(positions[:, None] + ahead)
        queries, keys = (angles.cos, angles.sin), (angles.key_cos, angles.key_sin)
        return tuple(
            torch.stack((q, k.expand_as(q)), 2) for q, k in zip(queries, keys, strict=True)
        )


def retnet_blocks(model: RetNet) -> list[RetNetBlock]:
    """Of a model without attention layers."""
    return cast(list[RetNetBlock], list(model.layers))


def decays(model: RetNet) -> list[Tensor]:
    """What a token shrinks each layer's state by, `[H,1|K]`."""
    return [
        block.retention.state_decay.to(model.device, model.exact_dtype)
        for block in retnet_blocks(model)
    ]


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
