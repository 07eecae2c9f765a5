"""Checks of what a config holds: values against their annotations, and sizes that must fit."""

import math
import types
import typing
from typing import Any, ClassVar, Literal

from retentive.errors import InputError, nearest

NAMES = {int: "a whole number", float: "a number", bool: "true or false", type(None): "nothing"}


def check_types(config: Any, prefix: str = "") -> None:
    """Raises InputError for a field whose value does not fit; a Literal's nearest word is named.

    `prefix` goes before the name of the field.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if typing.get_origin(hint) is not ClassVar and not _fits(value, hint):
            close = nearest(value, _words(hint)) if isinstance(value, str) else ""
            raise InputError(f"{prefix}{name} is {value!r}{close}; give {_describe(hint)}")


def _fits(value: Any, hint: Any) -> bool:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in options
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, option) for option in options)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, options[0]) for item in value)
    if hint in (int, float):
        number = int if hint is int else (int, float)
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, hint)


def _words(hint: Any) -> list[str]:
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    return [word for option in typing.get_args(hint) for word in _words(option)]


def _describe(hint: Any) -> str:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(options)
    if origin is tuple:
        return "a list of numbers"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_describe(option) for option in options)
    return NAMES.get(hint, f"a {hint.__name__}")


def check_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"{name} is {value}; give a number above 0")


def check_divisible(name: str, value: int, by: int, by_name: str = "num_heads") -> None:
    if value % by:
        raise InputError(
            f"{name} {value} is not divisible by {by_name} {by}; choose a multiple of it"
        )


def check_even(name: str, value: int | None, heads: int) -> None:
    assert value is not None
    if (value // heads) % 2:
        raise InputError(
            f"{name} {value} over {heads} heads gives the odd head dim {value // heads};"
            " rotation pairs dims, so choose an even one"
        )
