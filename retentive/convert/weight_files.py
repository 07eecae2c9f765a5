"""Files of weights: safetensors, and what torch.save wrote, opened without running their code."""

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from retentive.errors import InputError

SAFETENSORS, TORCH = (".safetensors",), (".bin", ".pt", ".pth")
DTYPES = {  # as safetensors writes them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Stored(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Read = Callable[[str], Tensor]


class WeightFile(Protocol):
    path: Path
    tensors: dict[str, Stored]
    """In the order in which they lie in the file."""
    arguments: dict[str, Any]
    """Hyperparameters beside the weights, where a trainer keeps them there."""

    def opened(self) -> AbstractContextManager[Read]:
        """Gives tensors by name; what was read is let go at the end."""
        ...


def open_file(path: Path) -> WeightFile:
    """InputError where the file is missing, broken, or wants to run code."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; fetch the checkpoint again")
    if path.suffix in SAFETENSORS:
        return SafetensorsFile(path)
    if path.suffix in TORCH:
        return TorchFile(path)
    raise InputError(f"{path} is no file of weights; give {', '.join((*SAFETENSORS, *TORCH))}")


class SafetensorsFile:
    """Every tensor is mapped anew, so that the pages of those before it are let go."""

    def __init__(self, path: Path):
        self.path = path
        self.arguments: dict[str, Any] = {}
        with self._mapped() as file:
            parts = {name: file.get_slice(name) for name in sorted(file.keys(), key=self._place())}
            self.tensors = {
                name: Stored(tuple(part.get_shape()), self._dtype(name, part.get_dtype()))
                for name, part in parts.items()
            }

    def _dtype(self, name: str, dtype: str) -> torch.dtype:
        if dtype not in DTYPES:
            raise _unknown_dtype(self.path, name, dtype)
        return DTYPES[dtype]

    def _place(self) -> Callable[[str], int]:
        """Where a tensor begins: of that the oldest library that we take says nothing."""
        with self.path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return lambda name: header[name]["data_offsets"][0]

    @contextmanager
    def _mapped(self) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="pt") as file:
                yield file
        except SafetensorError as error:
            raise InputError(
                f"{self.path} is truncated or no safetensors file ({error}); fetch it again"
            ) from error

    @contextmanager
    def opened(self) -> Iterator[Read]:
        def read(name: str) -> Tensor:
            with self._mapped() as file:
                return file.get_tensor(name)

        yield read


class TorchFile:
    """A state dict, or what trainers wrap one in: {"model": ...}, {"state_dict": ...}.

    Its tensors are mapped, so that of a file only those are in memory that were read.
    """

    def __init__(self, path: Path):
        self.path = path
        content = self._load()
        self.tensors = {}
        for name, tensor in self._weights(content).items():
            if tensor.dtype not in DTYPE_NAMES:
                raise _unknown_dtype(path, name, str(tensor.dtype).removeprefix("torch."))
            self.tensors[name] = Stored(tuple(tensor.shape), tensor.dtype)
        self.arguments = _arguments(content)

    @contextmanager
    def opened(self) -> Iterator[Read]:
        yield self._weights(self._load()).__getitem__

    def _weights(self, content: Any) -> dict[str, Tensor]:
        for wrapper in ("model", "state_dict"):
            if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
                content = content[wrapper]
        tensors = content.items() if isinstance(content, dict) else ()
        found = {
            name: tensor
            for name, tensor in tensors
            if isinstance(name, str) and isinstance(tensor, Tensor)
        }
        if not found:
            raise InputError(f"{self.path} holds no tensors by name; give a state dict")
        return found

    def _load(self) -> Any:
        try:
            # fairseq keeps its arguments in a Namespace: a class that only holds values.
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is odd about a file is an error or nothing
                return self._load_mapped()
        except pickle.UnpicklingError as error:
            wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
            if wanted is None:
                raise self._broken(error) from error
            raise InputError(
                f"{self.path} wants to run code when it is opened ({wanted[1]}), and nothing of"
                " a checkpoint is run here; take a safetensors file, or one of tensors only"
            ) from None
        except (RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
            raise self._broken(error) from error  # whatever damaged bytes lead the unpickler into

    def _load_mapped(self) -> Any:
        options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
        try:
            return torch.load(self.path, mmap=True, **options)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(self.path, **options)  # as torch wrote files before 1.6

    def _broken(self, error: Exception) -> InputError:
        found = re.search(r"WeightsUnpickler error: (.+)", str(error))
        reason = found[1] if found else (str(error).strip() or type(error).__name__).splitlines()[0]
        return InputError(
            f"{self.path} is truncated or no file of torch.save ({reason}); fetch it again"
        )


def _unknown_dtype(path: Path, name: str, dtype: str) -> InputError:
    return InputError(f"{path} holds {name} as {dtype}; known are {', '.join(DTYPES)}")


def _arguments(content: Any) -> dict[str, Any]:
    """fairseq's: {"args": Namespace}, or {"cfg": {"model": Namespace or dict}}."""
    if not isinstance(content, dict):
        return {}
    settings = content.get("cfg")
    for given in (
        settings.get("model") if isinstance(settings, dict) else None,
        content.get("args"),
    ):
        if isinstance(given, argparse.Namespace):
            return vars(given)
        if isinstance(given, dict):
            return given
    return {}
