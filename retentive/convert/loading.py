"""One loader for every command and for Python: our own folders, and anybody's checkpoint."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from retentive.convert.plan import OURS, plan
from retentive.convert.source import CONFIG, open_source
from retentive.convert.tokenizer import bring_tokenizer
from retentive.data import tokenizer as tokenizers
from retentive.devices import resolve_device, resolve_dtype
from retentive.errors import InputError
from retentive.models import checkpoint
from retentive.models.build import empty_model
from retentive.models.config import ModelConfig
from retentive.models.language_model import LanguageModel

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load(source: str | Path, *, device: str = "cpu", dtype: str = "float32") -> LanguageModel:
    """The model of `source`, in eval mode: a folder of ours, or any that `retentive convert` reads.

    That is: a local folder or file of a known dialect, or a name on the Hub. Beyond the model
    a tensor or two are in memory, of torch's own files one file. InputError where it does not
    open, with the reason.
    """
    if not _is_foreign(source):
        return checkpoint.load(Path(source).expanduser(), device=device, dtype=dtype)
    where, kind = resolve_device(device), resolve_dtype(dtype)
    made = plan(open_source(source))
    model = empty_model(made.config)
    as_stored = {name for name, _ in model.named_buffers()}  # quantised
    tensors = {}
    for name, tensor in made.stream():
        # A copy: what is mapped from a file is not aligned, see `io.tensors.read_tensors`.
        tensors[name] = tensor.to(where, tensor.dtype if name in as_stored else kind, copy=True)
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(made.config.quantization is None).to(where).eval()


def load_config(source: str | Path) -> ModelConfig:
    """The config of what `load` opens, in our fields; no weights are read."""
    if not _is_foreign(source):
        return checkpoint.load_config(Path(source).expanduser())
    return plan(open_source(source)).config


def load_tokenizer(source: str | Path) -> "Tokenizer":
    """The tokenizer of what `load` opens, or a tokenizer.json. InputError where there is none."""
    path = Path(source).expanduser()
    has_one = (path / tokenizers.FILE).is_file() or path.suffix == ".json"
    if has_one or not _is_foreign(source):
        return tokenizers.load_tokenizer(path)
    folder = open_source(source).folder
    with TemporaryDirectory() as made:
        said = bring_tokenizer(folder, Path(made), load_config(source).vocab_size)
        if not (Path(made) / tokenizers.FILE).is_file():
            raise InputError(f"{said[-1]}; put its tokenizer.json into the folder")
        return tokenizers.load_tokenizer(made)


def _is_foreign(source: str | Path) -> bool:
    """Is it another dialect's, or in parts? For all else `models.checkpoint` has better words."""
    path = Path(source).expanduser()
    if not path.is_dir():
        return True
    try:
        fields = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except OSError:
        return bool(weight_files(path))  # a trainer's, with its arguments in them
    except ValueError:
        return False
    if not isinstance(fields, dict):
        return False
    ours = fields.get("model_type") in OURS
    return not ours or (not (path / checkpoint.WEIGHTS).is_file() and bool(weight_files(path)))


def weight_files(folder: Path) -> list[Path]:
    """Files that hold weights, by their names."""
    kinds = (".safetensors", ".bin", ".pt", ".pth", ".index.json")
    return [path for path in folder.iterdir() if path.name.endswith(kinds)]
