"""Decoding by the mixers' own `step`, in torch's operations: what runs everywhere.

Shapes: B rows, T tokens.
"""

from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from retentive.errors import InputError
from retentive.layers.layout import Layout
from retentive.layers.rotation import Angles
from retentive.models.language_model import LanguageModel
from retentive.models.state import ModelState

AHEAD = 32  # positions whose angles are computed at once


class Runner(ABC):
    """Token ids in, logits out; the state between them is the runner's."""

    model: LanguageModel
    state: ModelState
    """After the tokens so far; the next step may change it (`clone` it to keep it)."""

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Logits `[B,vocab]` after one more token a row, int64 `[B]`.

        Raises InputError, and changes nothing, for another number of tokens.
        """
        rows = self.state.batch_size
        if tokens.shape != (rows,):
            raise InputError(
                f"expected one token per sequence: got {list(tokens.shape)} for a batch of {rows}"
            )
        return self._step(tokens)

    @abstractmethod
    def _step(self, tokens: Tensor) -> Tensor: ...


class RecurrentRunner(Runner):
    """`LanguageModel.decode_step`, again and again: states of fixed size are updated in place."""

    ahead = AHEAD

    @torch.inference_mode()
    def __init__(self, model: LanguageModel, state: ModelState):
        self.model, self.state = model, state
        self._layouts = LayoutsAhead(model, self.ahead)

    def _step(self, tokens: Tensor) -> Tensor:
        layout = self._layout()
        logits, layers = self.model.decode_step(tokens, self.state, layout)
        self.state.positions.add_(1)
        self.state = replace(self.state, layers=layers)
        return logits

    def _layout(self) -> Layout:
        return self._layouts.next(self.state.positions)


class LayoutsAhead:
    """The layouts of the steps to come; their angles are computed some at a time."""

    def __init__(self, model: LanguageModel, count: int):
        self._model, self._count = model, count
        self._layouts: list[Layout] = []  # the next one last

    def next(self, positions: Tensor) -> Layout:
        """That of one token a row at `positions` `[B]`: those of the last call and one more."""
        if not self._layouts:
            self._layouts = self._table(positions)[::-1]
        return self._layouts.pop()

    def _table(self, positions: Tensor) -> list[Layout]:
        steps = torch.arange(self._count, dtype=torch.int64, device=positions.device)
        ahead = positions[:, None] + steps  # [B,T]
        angles = self._model.angles(ahead)

        def layout(step: int) -> Layout:
            here = slice(step, step + 1)
            at = {key: Angles(*(x[:, here] for x in table)) for key, table in angles.items()}
            return Layout(ahead[:, here], at, ahead[:, step] + 1)

        return [layout(step) for step in range(self._count)]
