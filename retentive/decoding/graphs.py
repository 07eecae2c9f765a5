"""Decoding on a GPU by CUDA graphs: a step is recorded once for a number of slots, then replayed.

A step of a small batch is some hundred launches of a few microseconds each, which Python cannot
issue as fast as the GPU runs them. A graph issues them all at once, but always on the same memory.
So a model has slots: buffers of tokens, positions and states, which one runner at a time fills with
the rows of its batch. Steps are recorded for 1, 2, 4, 8, … slots, each when it is first needed;
slots that a batch leaves free are not active, and their states are neither read nor written.
"""

import weakref
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from retentive.decoding.runner import DecodeRunner, Mix
from retentive.layers.fused import Fused, around, norm_parts
from retentive.mixers.retention import MultiScaleRetention
from retentive.models.retnet import RetNet
from retentive.models.state import RetNetState

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


def suits(model: RetNet) -> bool:
    """Whether steps of this model can be recorded: on a GPU, by the kernels, from plain weights."""
    x = torch.empty(0, dtype=model.dtype, device=model.device)
    backends = {
        layer.backend for layer in model.modules() if isinstance(layer, MultiScaleRetention)
    }
    return (
        model.device.type == "cuda"
        and model.config.quantization is None
        and all(around(backend, x) is Fused for backend in backends)
    )


def bucket(rows: int) -> int:
    """The number of slots of the recording that serves `rows`: the next power of two.

    The weights are read as often for 5 rows as for 8, and a free slot's state is not.
    """
    return 1 << (rows - 1).bit_length()


class GraphRunner:
    """A `Runner` whose steps are replayed. Its rows are in the model's slots while it is stepped.

    Runners of one model may take turns: the one that steps takes the slots, and the state of the
    one before is kept for it. So a `state` that was asked for changes with the next step, or when
    another runner comes.
    """

    @torch.inference_mode()
    def __init__(self, model: RetNet, state: RetNetState, record_by: Record | None = None):
        self.model, self.rows = model, state.batch_size
        self._record = record_by or record
        self._kept: RetNetState | None = None  # while another has the slots
        self._enter(state)

    @property
    def state(self) -> RetNetState:
        if self._kept is not None:
            return self._kept
        return _first(_SLOTS[self.model].state, self.rows)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        if self._kept is not None:
            self._enter(self._kept)
            self._kept = None
        _SLOTS[self.model].tokens[: self.rows].copy_(tokens)
        return self._replay()[: self.rows].clone()  # the next replay writes over it

    @torch.inference_mode()
    def leave(self) -> None:
        """Gives the slots back, with a copy of the state that is in them."""
        self._kept = self.state.clone()

    def _enter(self, state: RetNetState) -> None:
        slots = slots_of(self.model, bucket(self.rows))
        self._replay = slots.recording(self.model, bucket(self.rows), self._record)
        slots.lend(self, state)


class Slots:
    """The buffers of a model's recorded steps, and the recordings by their number of slots."""

    def __init__(self, model: RetNet, capacity: int):
        self.capacity, self.weights = capacity, _addresses(model)
        self.state = model.init_state(capacity)
        self.tokens = torch.zeros(capacity, dtype=torch.int64, device=model.device)
        self.active = torch.zeros(capacity, dtype=torch.bool, device=model.device)
        self._recordings: dict[int, tuple[Step, DecodeRunner]] = {}  # whose constants it reads
        self._tenant: Callable[[], GraphRunner | None] = lambda: None

    def recording(self, model: RetNet, size: int, record: Record) -> Step:
        """The step of the first `size` slots. Recording it writes over what they hold."""
        if size not in self._recordings:
            self.vacate()
            tokens, state = self.tokens[:size], _first(self.state, size)
            runner = _SlotRunner(cast(RetNet, weakref.proxy(model)), state, self.active[:size])
            with torch.cuda.device_of(tokens):
                self._recordings[size] = record(lambda: runner.step(tokens)), runner
        return self._recordings[size][0]

    def lend(self, tenant: GraphRunner, state: RetNetState) -> None:
        """Fills the first slots with the rows of `state`, for `tenant`."""
        self.vacate()
        rows = state.batch_size
        self.active.fill_(False)[:rows] = True
        held = _first(self.state, rows)
        held.positions.copy_(state.positions)
        for mine, given in zip(held.layers, state.layers, strict=True):
            for name, tensor in mine.tensors().items():
                tensor.copy_(given.tensors()[name])
        self._tenant = weakref.ref(tenant)

    def vacate(self) -> None:
        if tenant := self._tenant():
            tenant.leave()
        self._tenant = lambda: None


_SLOTS: "weakref.WeakKeyDictionary[RetNet, Slots]" = weakref.WeakKeyDictionary()


def slots_of(model: RetNet, size: int) -> Slots:
    """The model's slots, made anew where they are fewer than `size` or its weights have moved."""
    slots = _SLOTS.get(model)
    if slots is None or slots.capacity < size or slots.weights != _addresses(model):
        if slots is not None:
            slots.vacate()
            del _SLOTS[model], slots  # before the new ones take memory
        slots = _SLOTS[model] = Slots(model, size)
    return slots


def _addresses(model: RetNet) -> list[int]:
    return [x.data_ptr() for x in (*model.parameters(), *model.buffers())]


def _first(state: RetNetState, rows: int) -> RetNetState:
    """The first rows of a state, sharing its memory."""
    layers = [
        type(layer).from_tensors({name: x[:rows] for name, x in layer.tensors().items()}, [])
        for layer in state.layers
    ]
    return RetNetState(state.positions[:rows], layers)


class _SlotRunner(DecodeRunner):
    """Steps that depend on nothing but the contents of the buffers they are given.

    Rotation, retention, norm and gate of a layer are one operator (`kernels.triton.decode`).
    """

    ahead = 1  # else angles of a few positions would be recorded as constants

    def __init__(self, model: RetNet, state: RetNetState, active: Tensor):
        self._active = active  # before the steps are made, which have it in them
        super().__init__(model, state)

    def _mix(self, retention: MultiScaleRetention) -> Mix:
        like = torch.empty(0, dtype=self.model.dtype, device=self.model.device)
        if around(retention.backend, like) is not Fused:
            return super()._mix(retention)
        from retentive.kernels.triton.decode import decode_step

        _, K, V = retention.state_shape
        norm, weight, bias, eps = norm_parts(retention.head_norm)
        active = self._active  # for the runner itself would be held by its own step

        def mix(h: Tensor, *, S: Tensor, gamma: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
            cos, sin = angles
            q, k, v, gate = retention.project(h.unsqueeze(1))
            q, k, v = (y.unflatten(-1, (-1, n)) for y, n in ((q, K), (k, K), (v, V)))
            tables = (cos[:, :1], sin[:, :1], cos[:, 1:], sin[:, 1:])
            y = decode_step(
                q, k, v, gate, S, gamma.squeeze(-1), *tables, active,
                weight, bias, norm, retention.gate_act, eps,
            )  # fmt: skip
            return retention.o_proj(y).squeeze(1)

        return mix
