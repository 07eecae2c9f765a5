"""The kinds of mixers. A kind is a file in this folder and a line of `MIXERS`."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from retentive.errors import InputError, nearest
from retentive.mixers.base import Mixer, MixerConfig

MIXERS = {  # kind, as a config names it: where its class is; imported when a config names it
    "retention": "retentive.mixers.retention:Retention",
    "attention": "retentive.mixers.attention:Attention",
}


def mixer_class(kind: str) -> type[Mixer]:
    """The class of a kind. Raises InputError for an unknown one, and where its file fails."""
    if kind not in MIXERS:
        raise InputError(
            f"unknown mixer {kind!r}{nearest(kind, MIXERS)}; choose one of {', '.join(MIXERS)}"
        )
    module, name = MIXERS[kind].split(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        raise InputError(
            f"the mixer {kind!r} cannot be imported from {MIXERS[kind]}:"
            f" {type(error).__name__}: {error}"
        ) from error


def mixer_config(fields: Mapping[str, Any], what: str = "mixer") -> MixerConfig:
    """The config of `fields["kind"]` with the other fields as its options, as JSON has them.

    Raises InputError for an unknown kind, an unknown or missing option, a value that does not fit;
    `what` says where the fields stand.
    """
    if not isinstance(kind := fields.get("kind"), str):
        raise InputError(f"{what} has no kind; give kind, one of {', '.join(MIXERS)}")
    options = {name: value for name, value in fields.items() if name != "kind"}
    return dataclass_of(mixer_class(kind).Config, options, f"{what} {kind}")


def dataclass_of(cls: Any, given: Mapping[str, Any], what: str) -> Any:
    """`cls(**given)`, lists as tuples; InputError names an unknown or missing field of `what`."""
    fields = [one for one in dataclasses.fields(cls) if one.init]
    known = [one.name for one in fields]
    for key in given.keys() - set(known):
        raise InputError(
            f"unknown {what} key {key!r}{nearest(key, known)}; known are {', '.join(known)}"
        )
    for one in fields:
        required = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if required and one.name not in given:
            raise InputError(f"{what} lacks {one.name!r}; give it a value")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def build(hidden_size: int, config: MixerConfig) -> Mixer:
    """The mixer of a resolved config (`MixerConfig.for_width`)."""
    return mixer_class(config.kind)(hidden_size, config)
