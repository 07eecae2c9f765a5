"""State tuning: of a frozen model only the initial state of every sequence is learned.

A prompt of constant cost: `[L,H,K,V]` for L retention layers, whatever it stands for.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from retentive.adapters.base import check_base
from retentive.errors import InputError
from retentive.io.tensors import read_tensors, write_tensors
from retentive.models.fingerprint import fingerprint
from retentive.models.language_model import LanguageModel

FILE = "initial_state.safetensors"
FORMAT = "retentive-initial-state"
_NAME = "initial_state"


class InitialState:
    """Zeros that can be trained, in a model that is frozen."""

    files = (FILE,)

    def __init__(self, model: LanguageModel):
        self.model, self.base = model, fingerprint(model)
        layers = model.tunable
        begin_with(model, torch.zeros(len(layers), *layers[0].state_shape))

    def save(self, folder: Path) -> None:
        states = [layer.initial_state for layer in self.model.tunable]
        stacked = torch.stack([state.detach() for state in states if state is not None])
        metadata = {"format": FORMAT, "fingerprint": self.base}
        write_tensors(folder / FILE, {_NAME: stacked}, metadata)

    def restore(self, folder: Path) -> None:
        """The values that were saved. InputError if those are another model's."""
        states, base = read(folder)
        check_base(folder, base, self.base)
        begin_with(self.model, states)


def read(folder: Path) -> tuple[Tensor, str]:
    """The states `[L,H,K,V]` and the fingerprint of their model. InputError for a broken file."""
    tensors, metadata = read_tensors(folder / FILE, "tuned state")
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{folder / FILE} holds no tuned state; give a folder that state tuning wrote"
        )
    return tensors[_NAME], metadata["fingerprint"]


def begin_with(model: LanguageModel, states: Tensor) -> None:
    """Makes `states` `[L,H,K,V]` the initial state of `model`; nothing else is trained."""
    model.requires_grad_(False)
    exact = states.to(model.device, model.exact_dtype)
    for layer, state in zip(model.tunable, exact, strict=True):
        layer.initial_state = nn.Parameter(state.clone())
