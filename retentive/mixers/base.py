"""What the rest of the package may ask of a mixer.

Shapes: B rows, T tokens, D width; x and y `[B,T,D]`, in a decoding step `[B,D]`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from retentive.fields import check_types
from retentive.layers.layout import Layout
from retentive.layers.rotation import Rotation
from retentive.mixers.state import LayerState, TensorState


class NotEmitted(Exception):
    """A module has no instructions for the decode program."""


@dataclass(frozen=True)
class MixerConfig:
    """The options of a mixer, plain and checked: `model.mixer` of a config or a TOML file.

    A kind has a dataclass of its own with these methods; none of them has to be overridden.
    """

    kind: ClassVar[str]
    ffn_ratio: ClassVar[float] = 4.0
    """The FFN's width over the model's where a config leaves it out (of a plain FFN)."""

    def __post_init__(self) -> None:
        check_types(self)

    def for_width(self, hidden_size: int) -> Self:
        """The same with all sizes filled in. Raises InputError where they do not fit the width."""
        return self

    @classmethod
    def default(cls, hidden_size: int) -> Self:
        """The usual options in a model of this width: where only the kind is given."""
        return cls()


class Mixer(nn.Module):
    """Mixes tokens along time.

    A mixer must have `__init__`, `forward`, `empty_state` and `init_weights`. The other methods
    have defaults that are right, if slow.
    """

    name: ClassVar[str]
    """Prefix of parameters and states, in reports the name of the part."""
    Config: ClassVar[type[MixerConfig]]
    grows: bool = False
    """Whether the state grows with the sequence."""
    rewrites_state: bool = True
    """Whether a decoding step writes the whole state (else it reads it and adds to it)."""
    rotation: Rotation | None
    """Of its queries and keys; None for a mixer without positions."""
    tunable: bool = False
    """Whether it begins with `initial_state` where that is not None."""
    exportable: bool = False
    """Whether `forward` is traced to a graph of plain operations, with a state of one tensor S."""
    initial_state: nn.Parameter | None
    state_shape: tuple[int, ...]

    def __init__(self, hidden_size: int, config: Any):
        """`config` is a resolved `Config` (`MixerConfig.for_width`). Shapes only, no values."""
        super().__init__()
        self.rotation = None

    def forward(self, x: Tensor, state: Any, layout: Layout) -> tuple[Tensor, Any]:
        """y and the state after these tokens, going on from `state` (None: the initial one).

        The given state is left as it is. The state after is None where the layout does not keep it.
        """
        raise NotImplementedError

    def empty_state(self, rows: int, like: Tensor, capacity: int = 0) -> LayerState:
        """The initial state of `rows` sequences, on the device of `like`, in the dtype it asks for.

        A state that grows has room for `capacity` tokens.
        """
        raise NotImplementedError

    def init_weights(
        self, initialization: str, depth: int, generator: torch.Generator | None = None
    ) -> None:
        """Values for all parameters: "paper" or "official", in a model of `depth` layers."""
        raise NotImplementedError

    # With defaults

    def step(self, x: Tensor, state: Any, layout: Layout) -> tuple[Tensor, Any]:
        """One token a row, x `[B,D]`: y and the state after, which may be `state`, updated."""
        y, after = self.forward(x.unsqueeze(1), state, layout)
        return y.squeeze(1), after

    def emit(self, program: Any, x: Any, state: Any) -> Any:
        """Writes the instructions of a step that updates `state`; gives the rows of y."""
        raise NotEmitted(self.name)

    def fixed_step(self, like: Tensor) -> bool:
        """Whether `step` for activations like this can be recorded as a CUDA graph."""
        return False

    def set_kernels(self, *, form: str, backend: str, chunk_size: int | None) -> None:
        """Choose how retention is computed; other mixers have no choice."""

    def restore_state(self, tensors: dict[str, Tensor], lengths: list[int]) -> LayerState:
        """The state of `LayerState.tensors`, of rows that have read `lengths` tokens."""
        return TensorState(self.name, tensors)

    def state_bytes(self, context: int, dtype: torch.dtype) -> int:
        """Bytes of the state of one sequence behind `context` tokens, in a model of `dtype`."""
        like = torch.empty(0, dtype=dtype, device="meta")
        return self.empty_state(1, like, context).nbytes

    def mixing_flops(self, context: float) -> float:
        """Forward FLOPs of a token behind `context` tokens, beside the linear layers."""
        return 0.0

    def undecayed(self) -> tuple[nn.Parameter, ...]:
        """Matrices that weight decay leaves alone; vectors always are."""
        return ()

    def log_decay_per_token(self) -> Tensor | None:
        """log of what a token leaves of each head's state, float64 `[H]`; None if it depends."""
        return None

    def describe(self) -> str:
        """The sizes in a few words, for `retentive info`."""
        return self.name

    # For mixers to use

    @property
    def state_signature(self) -> tuple[Any, ...]:
        """The `signature` of this mixer's states."""
        if (known := self.__dict__.get("_state_signature")) is None:
            known = self.empty_state(1, torch.empty(0, device="meta")).signature
            self.__dict__["_state_signature"] = known
        return known

    def sequence_by_sequence(
        self,
        x: Tensor,
        state: TensorState | None,
        layout: Layout,
        run: Callable[[Tensor, TensorState], tuple[Tensor, TensorState]],
    ) -> tuple[Tensor, TensorState | None]:
        """`forward` of a mixer that knows no packing: `run(x [B,T,D], state)` for each sequence.

        A dense batch is one call.
        """
        if state is None:
            state = self._like_empty(x, layout.rows)
        if layout.cu_seqlens is None:
            y, after = run(x, state)
            return y, after if layout.keeps_state else None
        initial = self._like_empty(x, 1)
        entering = TensorState(
            state.kind,
            {
                name: layout.sequence_states(tensor, initial[name][0])  # pyright: ignore
                for name, tensor in state.values.items()
            },
        )
        outputs, finals = [], []
        for index, (begin, end) in enumerate(layout.pieces()):
            here = entering.select(torch.tensor([index], device=x.device))
            if begin < end:
                y, here = run(x[:, begin:end], here)
                outputs.append(y)
            finals.append(here)
        after = None
        if layout.keeps_state:
            together = TensorState.concat(finals)
            rows = {name: layout.row_states(x) for name, x in together.values.items()}
            after = replace(together, values=rows)
        return torch.cat(outputs, 1), after

    def _like_empty(self, x: Tensor, rows: int) -> TensorState:
        state = self.empty_state(rows, x)
        assert isinstance(state, TensorState)
        return state
