"""One token more for each row of a batch, again and again: the weights read once a token.

`DecodeRunner` is RetNet's. Its state has a fixed size, so it is updated where it lies, and the
angles of the next positions are computed some at a time. `ModelRunner` serves any other model.
"""

import time
from typing import Protocol, cast

import torch
from torch import Tensor

from retentive.models.language_model import LanguageModel
from retentive.models.layers import MultiScaleRetention
from retentive.models.layout import rotate
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
        self._blocks = cast(list[RetNetBlock], list(model.layers))
        decays = (block.retention.state_decay.unsqueeze(-1) for block in self._blocks)
        self._gammas = [decay.to(model.device, model.exact_dtype) for decay in decays]
        self._angles: list[tuple[Tensor, Tensor]] = []  # of the positions to come, the next last

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        x = self.model.embed(tokens)
        cos, sin = self._next_angles()
        layers = zip(self._blocks, self.state.layers, self._gammas, strict=True)
        for block, layer_state, gamma in layers:
            x = self._block(block, x, layer_state.S, gamma, cos, sin)
        self.state.positions.add_(1)
        return self.model.head(self.model.norm(x))

    def _block(
        self, block: RetNetBlock, x: Tensor, S: Tensor, gamma: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """x `[B,D]` through a block, S `[B,H,K,V]`, gamma `[H,1|K,1]`, cos, sin `[B,2,H|1,K]`."""

        def mix(h: Tensor) -> tuple[Tensor, None]:
            return self._mix(block.retention, h, S, gamma, cos, sin), None

        return block.around(x, mix)[0]

    def _mix(
        self,
        retention: MultiScaleRetention,
        h: Tensor,
        S: Tensor,
        gamma: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        """The layer's y `[B,D]` of h `[B,D]`; the rest as for `_block`."""
        rows, _, K, V = S.shape
        q, k, v, gate = retention.project(h)
        q, k, v = q.view(rows, -1, K), k.view(rows, -1, K), v.view(rows, -1, V)
        q, k = rotate(torch.stack((q, retention.share(k)), 1).to(S.dtype), cos, sin).unbind(1)
        o = self._retain(S, gamma, q, k, retention.share(v).to(S.dtype))
        return retention.output(o.to(h.dtype), gate)

    def _retain(self, S: Tensor, gamma: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """S ← γ S + kᵀ v, o = q S for q, k `[B,H,K]` and v `[B,H,V]` (paper §2.2).

        With xPos γ is that of a channel, a row of S.
        """
        S.mul_(gamma)
        matrices = S.flatten(0, 1)
        matrices.baddbmm_(k.flatten(0, 1).unsqueeze(2), v.flatten(0, 1).unsqueeze(1))
        return torch.bmm(q.flatten(0, 1).unsqueeze(1), matrices).view(v.shape)

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
