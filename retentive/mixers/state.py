"""The state of one mixer: what it keeps of the tokens it has read, a row for each sequence.

Shapes: B rows; every tensor of a state is `[B,...]`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor


class LayerState(Protocol):
    """What `ModelState` asks of a layer's state. Nothing here changes its object."""

    @property
    def kind(self) -> str:
        """Part of the tensors' names in a file."""
        ...

    @property
    def signature(self) -> tuple[Any, ...]:
        """The kind and the sizes of a row: equal for all states that a mixer takes."""
        ...

    @property
    def nbytes(self) -> int: ...

    def select(self, rows: Tensor) -> Self:
        """The given rows, int64, in that order."""
        ...

    def clone(self) -> Self:
        """A state that may be updated in place; a cache that never is may return itself."""
        ...

    def detach(self) -> Self: ...
    def to(self, device: torch.device | str) -> Self: ...
    def tensors(self) -> dict[str, Tensor]: ...
    @classmethod
    def concat(cls, states: Sequence[Self]) -> Self: ...


@dataclass(frozen=True)
class TensorState:
    """A state of fixed size: named tensors `[B,...]`, such as S `[B,H,K,V]` of retention."""

    kind: str
    values: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    @property
    def signature(self) -> tuple[Any, ...]:
        return (self.kind, *((name, *x.shape[1:]) for name, x in self.values.items()))

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.values.values())

    def select(self, rows: Tensor) -> Self:
        return self._each(lambda x: x.index_select(0, rows))

    def clone(self) -> Self:
        return self._each(lambda x: x.clone(memory_format=torch.contiguous_format))

    def detach(self) -> Self:
        return self._each(Tensor.detach)

    def to(self, device: torch.device | str) -> Self:
        return self._each(lambda x: x.to(device))

    def first(self, rows: int) -> Self:
        """The first rows, sharing their memory."""
        return self._each(lambda x: x[:rows])

    def copy_(self, other: "TensorState") -> None:
        """Writes the rows of `other` over these."""
        for name, x in self.values.items():
            x.copy_(other[name])

    def tensors(self) -> dict[str, Tensor]:
        return self.values

    @classmethod
    def concat(cls, states: Sequence[Self]) -> Self:
        names = states[0].values
        return cls(
            states[0].kind, {name: torch.cat([state[name] for state in states]) for name in names}
        )

    def _each(self, f: Any) -> Self:
        return type(self)(self.kind, {name: f(x) for name, x in self.values.items()})
