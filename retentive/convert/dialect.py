"""What a dialect is: their config, which tensor is which, and what gives it away.

A file in `dialects/` holds the three as tables. Nothing is computed with weights but the choice of
rows: what does not fold exactly is a field of our config (so that every way back is bit-exact).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from retentive.convert.source import Source
from retentive.convert.weight_files import Stored
from retentive.errors import InputError
from retentive.fields import check_types
from retentive.models.config import RetNetConfig

Rows = Callable[[RetNetConfig, int], Tensor]
Condition = Callable[[RetNetConfig], bool]


@dataclass(frozen=True)
class Weight:
    """A tensor of ours is a tensor of theirs, or some of its rows. "{}" is the number of a layer.

    rows   (config, n) -> the rows of theirs that are the n rows of ours, in our order
    when   the entry holds for models of this config only

    Of several entries for one tensor of ours the first counts that is in the checkpoint; in writing
    simply the first.
    """

    theirs: str
    ours: str
    rows: Rows | None = None
    when: Condition = lambda config: True


@dataclass(frozen=True)
class Constant:
    """A tensor of theirs that follows from the config: compared if it is there, and written."""

    theirs: str
    value: Callable[[RetNetConfig], Tensor]


class Checkpoint(Protocol):
    """What a config may ask of the weights it came with."""

    @property
    def tensors(self) -> Mapping[str, Stored]: ...

    def read(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class TheirConfig:
    """The fields of their config.json that matter, with their types and their code's defaults.

    A dialect's subclass; other keys are passed over.
    """

    written: ClassVar[Mapping[str, Any]] = {}
    """What a config.json that is written holds besides."""

    @classmethod
    def read(cls, given: Mapping[str, Any], what: str = "it") -> Self:
        """InputError where a field is missing, of a wrong type, or of a value not known here."""
        for field in fields(cls):
            if field.default is MISSING and field.name not in given:
                raise InputError(f"{what} lacks {field.name!r}")
        known = given.keys() & {field.name for field in fields(cls)}
        config = cls(**{name: _as_tuple(given[name]) for name in known})
        check_types(config)
        return config

    def only(self, **allowed: Any) -> None:
        """InputError where a field has another value than the only one that is known here."""
        for name, value in allowed.items():
            if (given := getattr(self, name)) != value:
                raise InputError(f"{name} is {given!r}; only {value!r} is known here")

    def to_ours(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """The fields of our config."""
        raise NotImplementedError

    @classmethod
    def from_ours(cls, config: RetNetConfig) -> Self:
        """The nearest config of theirs: what it cannot say shows when `to_ours` reads it back.

        Only a dialect that can be written has it.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Dialect:
    """`evidence` gives the key (or field) by which a checkpoint is known to be of this dialect."""

    name: str
    title: str
    config: type[TheirConfig]
    weights: tuple[Weight, ...]
    evidence: Callable[[Source], str | None]
    constants: tuple[Constant, ...] = ()
    stores_tied_head: bool = False
    """Does their loader want a head in the file that is the embedding?"""


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def find_key(names: Iterable[str], start: str, part: str) -> str | None:
    """The first name that begins with `start` and contains `part`."""
    return next((name for name in sorted(names) if name.startswith(start) and part in name), None)


# Rows


def half_pairs(config: RetNetConfig, count: int) -> Tensor:
    """Of W_Q or W_K: theirs turn the dims 2p and 2p + 1 of a head together, ours p and p + K/2.

    Where only the first R dims of a head turn, the others fill the places that are left.
    """
    K = config.mixer.qk_head_dim
    R = K if config.mixer.rotary_dim is None else config.mixer.rotary_dim
    dims, middle = torch.arange(K), (R + K) // 2
    head = torch.cat((dims[:R:2], dims[R:middle], dims[1:R:2], dims[middle:]))
    return (torch.arange(0, count, K).unsqueeze(1) + head).flatten()


def first_half(config: RetNetConfig, count: int) -> Tensor:
    return torch.arange(count)


def second_half(config: RetNetConfig, count: int) -> Tensor:
    return torch.arange(count, 2 * count)
