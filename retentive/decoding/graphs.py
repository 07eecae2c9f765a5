"""Decoding on a GPU by CUDA graphs: a step is recorded once for a number of slots, then replayed.

A step of a small batch is some hundred launches of a few microseconds each, which Python cannot
issue as fast as the GPU runs them. A graph issues them all at once, but always on the same memory.
So a model has slots: buffers of tokens, positions and states, which one runner at a time fills with
the rows of its batch. Steps are recorded for 1, 2, 4, 8, … slots, each when it is first needed;
slots that a batch leaves free are not active, and their states are neither read nor written.
"""

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from retentive.decoding.recurrent import RecurrentRunner, Runner
from retentive.layers.layout import Layout
from retentive.mixers.state import TensorState
from retentive.models.language_model import LanguageModel
from retentive.models.state import ModelState

WARM_UP = 2  # steps before a recording: libraries set themselves up, kernels are compiled

Step = Callable[[], Tensor]
Record = Callable[[Step], Step]


def record(step: Step) -> Step:
    """Replays what `step` does, into the same memory; it holds nothing of `step`'s but that."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch.cuda.graph asks for
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


def suits(model: LanguageModel) -> bool:
    """Whether steps of this model can be recorded: on a GPU, by the kernels, from plain weights."""
    x = torch.empty(0, dtype=model.dtype, device=model.device)
    return (
        model.device.type == "cuda"
        and model.config.quantization is None
        and all(block.mixer.fixed_step(x) for block in model.blocks)
    )


def bucket(rows: int) -> int:
    """The number of slots of the recording that serves `rows`: the next power of two.

    The weights are read as often for 5 rows as for 8, and a free slot's state is not.
    """
    return 1 << (rows - 1).bit_length()


class GraphRunner(Runner):
    """A `Runner` whose steps are replayed. Its rows are in the model's slots while it is stepped.

    Runners of one model may take turns: the one that steps takes the slots, and the state of the
    one before is kept for it. So a `state` that was asked for changes with the next step, or when
    another runner comes.
    """

    @torch.inference_mode()
    def __init__(self, model: LanguageModel, state: ModelState, record_by: Record | None = None):
        self.model, self.rows = model, state.batch_size
        self._record = record_by or record
        self._kept: ModelState | None = None  # while another has the slots
        self._enter(state)

    @property
    def state(self) -> ModelState:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self._kept is not None:
            return self._kept
        return _first(_SLOTS[self.model].state, self.rows)

    def _step(self, tokens: Tensor) -> Tensor:
        if self._kept is not None:
            self._enter(self._kept)
            self._kept = None
        _SLOTS[self.model].tokens[: self.rows].copy_(tokens)
        return self._replay()[: self.rows].clone()  # the next replay writes over it

    @torch.inference_mode()
    def leave(self) -> None:
        """Gives the slots back, with a copy of the state that is in them."""
        self._kept = self.state.clone()

    def _enter(self, state: ModelState) -> None:
        slots = slots_of(self.model, bucket(self.rows))
        self._replay = slots.recording(self.model, bucket(self.rows), self._record)
        slots.lend(self, state)


class Slots:
    """The buffers of a model's recorded steps, and the recordings by their number of slots."""

    def __init__(self, model: LanguageModel, capacity: int):
        self.capacity, self.weights = capacity, _addresses(model)
        self.state = model.init_state(capacity)
        self.tokens = torch.zeros(capacity, dtype=torch.int64, device=model.device)
        self.active = torch.zeros(capacity, dtype=torch.bool, device=model.device)
        self._recordings: dict[int, tuple[Step, RecurrentRunner]] = {}  # whose constants it reads
        self._tenant: Callable[[], GraphRunner | None] = lambda: None

    def recording(self, model: LanguageModel, size: int, record: Record) -> Step:
        """The step of the first `size` slots. Recording it writes over what they hold."""
        if size not in self._recordings:
            self.vacate()
            tokens, state = self.tokens[:size], _first(self.state, size)
            runner = _SlotRunner(
                cast(LanguageModel, weakref.proxy(model)), state, self.active[:size]
            )
            with torch.cuda.device_of(tokens):
                self._recordings[size] = record(lambda: runner.step(tokens)), runner
        return self._recordings[size][0]

    def lend(self, tenant: GraphRunner, state: ModelState) -> None:
        """Fills the first slots with the rows of `state`, for `tenant`."""
        self.vacate()
        rows = state.batch_size
        self.active.fill_(False)[:rows] = True
        held = _first(self.state, rows)
        held.positions.copy_(state.positions)
        for mine, given in zip(held.layers, state.layers, strict=True):
            mine.copy_(given)
        self._tenant = weakref.ref(tenant)

    def vacate(self) -> None:
        if tenant := self._tenant():
            tenant.leave()
        self._tenant = lambda: None


_SLOTS: "weakref.WeakKeyDictionary[LanguageModel, Slots]" = weakref.WeakKeyDictionary()


def slots_of(model: LanguageModel, size: int) -> Slots:
    """The model's slots, made anew where they are fewer than `size` or its weights have moved."""
    slots = _SLOTS.get(model)
    if slots is None or slots.capacity < size or slots.weights != _addresses(model):
        if slots is not None:
            slots.vacate()
            del _SLOTS[model], slots  # before the new ones take memory
        slots = _SLOTS[model] = Slots(model, size)
    return slots


def _addresses(model: LanguageModel) -> list[int]:
    return [x.data_ptr() for x in (*model.parameters(), *model.buffers())]


def _first(state: ModelState, rows: int) -> ModelState:
    """The first rows of a state, sharing its memory."""
    layers = [cast(TensorState, layer).first(rows) for layer in state.layers]
    return ModelState(state.positions[:rows], layers)


class _SlotRunner(RecurrentRunner):
    """Steps that depend on nothing but the contents of the buffers they are given."""

    ahead = 1  # else angles of a few positions would be recorded as constants

    def __init__(self, model: LanguageModel, state: ModelState, active: Tensor):
        super().__init__(model, state)
        self._active = active

    def _layout(self) -> Layout:
        return replace(super()._layout(), active=self._active)
