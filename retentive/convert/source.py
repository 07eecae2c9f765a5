"""A checkpoint as it lies there: a folder, a file, or a name on the Hub; in one file or many."""

import json
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from retentive.convert.hub import fetch, is_name
from retentive.convert.weight_files import SAFETENSORS, TORCH, Stored, WeightFile, open_file
from retentive.errors import InputError

CONFIG = "config.json"
INDEX = ".index.json"
WRAPPED = "decoder."  # begins every name where fairseq's model is around the decoder
# What libraries call the weights in a folder, the best first.
NAMES = ("model.safetensors", "pytorch_model.bin", "checkpoint.pt", "model.pt")


@dataclass(frozen=True)
class Source:
    """A checkpoint, its tensors not yet read.

    given    what the user called it
    folder   where its config and tokenizer are
    config   what config.json says, or the trainer's arguments in the file of weights
    """

    given: str
    folder: Path
    config: dict[str, Any]
    files: tuple[WeightFile, ...]

    @cached_property
    def _prefix(self) -> str:
        """What all names begin with in vain. Of all files: a shard may hold nothing but layers."""
        names = (name for file in self.files for name in file.tensors)
        return WRAPPED if all(name.startswith(WRAPPED) for name in names) else ""

    @property
    def tensors(self) -> dict[str, Stored]:
        return {
            name.removeprefix(self._prefix): stored
            for file in self.files
            for name, stored in file.tensors.items()
        }

    def read(self, name: str) -> Tensor:
        """One tensor, a copy."""
        [(_, tensor)] = self.stream({name})
        return tensor.clone()

    def stream(self, names: Set[str]) -> Iterator[tuple[str, Tensor]]:
        """These tensors in the order of the files; each is there until the next is asked for."""
        for file in self.files:
            there = {name.removeprefix(self._prefix): name for name in file.tensors}
            if wanted := [name for name in there if name in names]:
                with file.opened() as read:
                    for name in wanted:
                        yield name, read(there[name])


def open_source(given: str | Path) -> Source:
    """InputError where there is nothing, where it is broken, or where the Hub cannot be reached."""
    path = Path(given).expanduser()
    if not path.exists():
        if not is_name(str(given)):
            raise InputError(f"there is no file or folder {given}; give one, or a name on the Hub")
        path = fetch(str(given))
    folder, files = (path, _files(path)) if path.is_dir() else (path.parent, [path])
    opened = tuple(open_file(file) for file in files)
    counts = Counter(name for file in opened for name in file.tensors)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise InputError(f"{given} holds {min(twice)} in two files; keep one checkpoint in it")
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else opened[0].arguments
    return Source(str(given), folder, config, opened)


def _files(folder: Path) -> list[Path]:
    """The files of weights in a folder."""
    for name in NAMES:
        if (folder / name).is_file():
            return [folder / name]
        if (folder / (name + INDEX)).is_file():
            return _shards(folder / (name + INDEX))
    for suffixes in (SAFETENSORS, TORCH):
        found = sorted(path for path in folder.iterdir() if path.suffix in suffixes)
        if len(found) > 1:
            names = ", ".join(path.name for path in found[:3])
            raise InputError(f"{folder} holds several files of weights ({names}); name the one")
        if found:
            return found
    raise InputError(
        f"{folder} holds no weights; give a folder with {' or '.join(NAMES)}, or a file"
    )


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{index} has no weight_map; fetch it again")
    if not names:
        raise InputError(f"{index} has an empty weight_map; fetch it again")
    shards = sorted(set(names.values()))
    if outside := [name for name in shards if Path(name).name != name]:
        raise InputError(f"{index} names a file outside of its folder, {outside[0]}")
    return [index.with_name(name) for name in shards]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. InputError where it is broken."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is truncated or no JSON ({error}); fetch it again") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path} holds no object of fields; fetch it again")
    return fields
