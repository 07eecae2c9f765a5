"""What a model remembers of the tokens it has read: select, clone, save, load.

Shapes: B rows (one text each), T tokens, H heads, K and V head dims.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from retentive.errors import InputError
from retentive.io.tensors import read_tensors, write_tensors
from retentive.mixers.kv_cache import KVCache
from retentive.mixers.window import WindowCache

FORMAT = "retentive-state"


class LayerState(Protocol):
    """What one layer remembers. Nothing here changes the object it is called on."""

    kind: ClassVar[str]

    @property
    def signature(self) -> tuple[Any, ...]:
        """What must agree with a layer for the state to be of its kind: the kind and the sizes."""
        ...

    @property
    def nbytes(self) -> int: ...

    def select(self, rows: Tensor) -> Self: ...
    def reset(self, rows: Tensor) -> Self: ...
    def clone(self) -> Self: ...
    def detach(self) -> Self: ...
    def to(self, device: torch.device | str) -> Self: ...
    def tensors(self) -> dict[str, Tensor]: ...
    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], lengths: Sequence[int]) -> Self: ...
    @classmethod
    def concat(cls, states: Sequence[Self]) -> Self: ...


@dataclass(frozen=True)
class RetentionState:
    """S = Σ_m γ^(n-m) k_mᵀ v_m, float32 (float64 for a float64 model) `[B,H,K,V]`."""

    S: Tensor
    kind: ClassVar[str] = "retention"

    @property
    def signature(self) -> tuple[Any, ...]:
        return (self.kind, *self.S.shape[1:])

    @property
    def nbytes(self) -> int:
        return self.S.nbytes

    def select(self, rows: Tensor) -> Self:
        return type(self)(self.S.index_select(0, rows))

    def reset(self, rows: Tensor) -> Self:
        return type(self)(self.S.masked_fill(rows[:, None, None, None], 0))

    def clone(self) -> Self:
        return type(self)(self.S.clone(memory_format=torch.contiguous_format))

    def detach(self) -> Self:
        return type(self)(self.S.detach())

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.S.to(device))

    def tensors(self) -> dict[str, Tensor]:
        return {"S": self.S}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], lengths: Sequence[int]) -> Self:
        return cls(tensors["S"])

    @classmethod
    def concat(cls, states: Sequence[Self]) -> Self:
        return cls(torch.cat([state.S for state in states]))


KINDS: dict[str, type[LayerState]] = {
    kind.kind: kind for kind in (RetentionState, KVCache, WindowCache)
}


@dataclass(frozen=True)
class RetNetState:
    """What any of our models remembers. `forward` never changes one: keep it, branch from it.

    positions: how many tokens each row has read, int64 `[B]`. layers: the state of each layer.
    """

    positions: Tensor
    layers: list[Any]

    @property
    def batch_size(self) -> int:
        return self.positions.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held by the layers."""
        return sum(layer.nbytes for layer in self.layers)

    def select(self, rows: Tensor | Sequence[int]) -> Self:
        """The given rows in that order, repeats allowed: beams, or those of a batch still going."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.positions.device)
        layers = [layer.select(index) for layer in self.layers]
        return type(self)(self.positions.index_select(0, index), layers)

    def reset(self, rows: Tensor) -> Self:
        """Rows where `rows` (bool `[B]`) is True have read nothing: position 0, states of zeros."""
        rows = rows.to(self.positions.device)
        layers = [layer.reset(rows) for layer in self.layers]
        return type(self)(self.positions.masked_fill(rows, 0), layers)

    def clone(self) -> Self:
        """A copy that shares nothing: needed only before an update in place."""
        return type(self)(self.positions.clone(), [layer.clone() for layer in self.layers])

    def detach(self) -> Self:
        """Cut from the graph: gradients end here (truncated back-propagation through time)."""
        return type(self)(self.positions, [layer.detach() for layer in self.layers])

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.positions.to(device), [layer.to(device) for layer in self.layers])

    def save(
        self,
        path: str | Path,
        *,
        fingerprint: str,
        extra: dict[str, Any] | None = None,
        tensors: dict[str, Tensor] | None = None,
    ) -> None:
        """Writes it with the `fingerprint` of its model, and what JSON and tensors go with it."""
        held = {"positions": self.positions}
        for index, layer in enumerate(self.layers):
            for name, tensor in layer.tensors().items():
                held[f"layers.{index}.{layer.kind}.{name}"] = tensor
        held |= {f"extra.{name}": tensor for name, tensor in (tensors or {}).items()}
        metadata = {"format": FORMAT, "fingerprint": fingerprint, "extra": json.dumps(extra or {})}
        write_tensors(path, held, metadata)

    @classmethod
    def load(
        cls, path: str | Path, *, fingerprint: str, device: torch.device | str = "cpu"
    ) -> tuple[Self, dict[str, Any], dict[str, Tensor]]:
        """The state, on `device`, and the `extra` and `tensors` saved with it.

        Raises InputError where the file is missing, broken, or of another `fingerprint`.
        """
        held, metadata = read_tensors(path, "state file")
        if metadata.get("format") != FORMAT:
            raise InputError(f"{path} holds no saved state; give a file written by --save-state")
        saved, given = metadata["fingerprint"], fingerprint
        saved_dtype, given_dtype = (mark.partition(":")[0] for mark in (saved, given))
        if saved_dtype != given_dtype:
            raise InputError(
                f"the state in {path} is of a model in {saved_dtype}, this one is in {given_dtype};"
                f" load the model with --dtype {saved_dtype}"
            )
        if saved != given:
            raise InputError(
                f"the state in {path} is of another model or other weights;"
                " use the model that wrote it"
            )
        extra = {k.removeprefix("extra."): v for k, v in held.items() if k.startswith("extra.")}
        state = cls._from_tensors(held).to(device)
        return state, json.loads(metadata["extra"]), extra

    @classmethod
    def _from_tensors(cls, held: dict[str, Tensor]) -> Self:
        by_layer: dict[int, tuple[str, dict[str, Tensor]]] = {}
        for key, tensor in held.items():
            if key.startswith("layers."):
                _, index, kind, name = key.split(".")
                by_layer.setdefault(int(index), (kind, {}))[1][name] = tensor
        lengths = held["positions"].tolist()
        layers = [
            KINDS[kind].from_tensors(tensors, lengths)
            for _, (kind, tensors) in sorted(by_layer.items())
        ]
        return cls(held["positions"], layers)


def concat(states: Sequence[RetNetState]) -> RetNetState:
    """The rows of several states of one model as one batch."""
    layers = [
        type(parts[0]).concat(parts) for parts in zip(*(s.layers for s in states), strict=True)
    ]
    return RetNetState(torch.cat([s.positions for s in states]), layers)
