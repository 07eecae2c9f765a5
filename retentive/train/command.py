"""`retentive train CONFIG`: a run from a TOML file and the command line."""

import shlex
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import tyro

from retentive.arguments import parse
from retentive.devices import keep_freed_memory
from retentive.train.config import load_config, option, options
from retentive.train.loop import Result, train

DESCRIPTION = (
    "Train a model from a TOML file. Every key of the file is an option, too: --optimizer.lr 1e-3."
)


@dataclass(frozen=True)
class Arguments:
    config: tyro.conf.Positional[Path]
    """The run's TOML file, such as configs/demo.toml."""
    out: Path | None = None
    """The run folder, a model folder in the end. Default: runs/ and the config's name."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on from the last checkpoint in the run folder."""
    device: str | None = None
    """auto, cpu, cuda, cuda:1 or mps; the same as --train.device."""
    dtype: str | None = None
    """auto, float32, bfloat16 or float64; the same as --train.dtype."""


def main(argv: Sequence[str]) -> int:
    overrides, rest = split_overrides(argv)
    try:
        given = parse(Arguments, rest, "retentive train", DESCRIPTION)
    except SystemExit:  # --help
        print(keys_help())
        raise
    for key in ("device", "dtype"):
        if (word := getattr(given, key)) is not None:
            overrides[f"train.{key}"] = [word]
    out = given.out or Path("runs") / given.config.stem
    keep_freed_memory()
    result = train(load_config(given.config, overrides), out, resume=given.resume)
    if result.finished:
        print(
            f"{out} is finished: {_summary(result)}; a higher --train.steps goes on with --resume"
        )
    else:
        again = ["retentive", "train", *argv, *([] if given.resume else ["--resume"])]
        print(f"stopped: {_summary(result)}; continue with: {shlex.join(again)}")
    return 0


def _summary(result: Result) -> str:
    bits = result.bits_per_byte
    quality = "" if bits is None else f", {bits:.4f} bits per byte"
    return f"{result.step} of {result.steps} steps{quality}"


def split_overrides(argv: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The dotted options with their words, and the other arguments. InputError: an unknown key."""
    overrides: dict[str, list[str]] = {}
    rest, words = [], list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith("--") or "." not in name:
            rest.append(word)
            continue
        key = name.removeprefix("--").replace("-", "_")
        if equals:
            overrides[key] = [value]
        else:
            count = _word_count(option(key).type, words)
            overrides[key], words = words[:count], words[count:]
    return overrides, rest


def _word_count(hint: Any, words: Sequence[str]) -> int:
    """How many of `words` an option of type `hint` takes: a list goes up to the next option."""
    if hint is bool:
        return int(bool(words) and words[0] in ("true", "false"))
    if get_origin(hint) is tuple:
        return next((n for n, word in enumerate(words) if word.startswith("--")), len(words))
    return min(1, len(words))


def keys_help() -> str:
    rows = [
        (f"--{key}", _describe(hint), "" if default in (None, MISSING) else repr(default))
        for key, (hint, default) in options().items()
    ]
    wide = max(len(key) for key, _, _ in rows)
    lines = [f"  {key:{wide}}  {kind:28}  {default}" for key, kind, default in rows]
    return "\n".join(["keys of the TOML file, their types and defaults:", *lines])


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "|".join(get_args(hint))
    if get_origin(hint) is tuple:
        return f"{_describe(get_args(hint)[0])} ..."
    options = [each for each in get_args(hint) if each is not NoneType]
    return "|".join(map(_describe, options)) if options else hint.__name__
