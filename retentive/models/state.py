"""The state of a model: select rows, clone, save, load.

Shapes: B rows, a sequence each.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from retentive.errors import InputError
from retentive.io.tensors import read_tensors, write_tensors
from retentive.mixers.state import LayerState

FORMAT = "retentive-state"

Restore = Callable[[dict[str, Tensor], list[int]], LayerState]
"""`Mixer.restore_state` of a layer."""


@dataclass(frozen=True)
class ModelState:
    """The state of every layer. `forward` never changes one: keep it, branch from it.

    positions: how many tokens each row has read, int64 `[B]`. layers: the state of each mixer.
    """

    positions: Tensor
    layers: list[Any]  # LayerState

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

    def clone(self) -> Self:
        """A state that may be updated in place; caches that never are stay shared."""
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
        cls, path: str | Path, *, fingerprint: str, restore: Sequence[Restore]
    ) -> tuple[Self, dict[str, Any], dict[str, Tensor]]:
        """The state and the `extra` and `tensors` saved with it (`models.checkpoint.load_state`).

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
        return cls._from_tensors(held, restore), json.loads(metadata["extra"]), extra

    @classmethod
    def _from_tensors(cls, held: dict[str, Tensor], restore: Sequence[Restore]) -> Self:
        by_layer: list[dict[str, Tensor]] = [{} for _ in restore]
        for key, tensor in held.items():
            if key.startswith("layers."):
                _, index, _, name = key.split(".", 3)
                by_layer[int(index)][name] = tensor
        lengths = held["positions"].tolist()
        layers = [make(given, lengths) for make, given in zip(restore, by_layer, strict=True)]
        return cls(held["positions"], layers)


def concat(states: Sequence[ModelState]) -> ModelState:
    """The rows of several states of one model as one batch."""
    layers = [
        type(parts[0]).concat(parts) for parts in zip(*(s.layers for s in states), strict=True)
    ]
    return ModelState(torch.cat([s.positions for s in states]), layers)


RetNetState = ModelState
"""The name of before other models had states."""
