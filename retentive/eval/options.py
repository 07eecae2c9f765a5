"""What the options of all evaluations have in common, and the model they open."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from retentive.convert.loading import load, load_config, load_tokenizer
from retentive.data.tokenizer import TextTokenizer
from retentive.devices import resolve_device, resolve_dtype
from retentive.errors import InputError
from retentive.eval.results import Results, check_folder, default_folder, identity
from retentive.models.language_model import LanguageModel


@dataclass(frozen=True)
class Options:
    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """A model folder, or the folder of a training run."""
    batch_size: int = 16
    """Rows read at once."""
    out: Path | None = None
    """The folder of this model's results, runs/eval/NAME unless given. What is finished there is
    not done again."""
    device: str = "auto"
    """cpu, cuda, cuda:N, mps or auto."""
    dtype: str = "float32"
    """float32, bfloat16, float16 or float64."""

    def check(self) -> None:
        """What can be said before anything is loaded."""
        check_least("batch_size", self.batch_size)
        resolve_device(self.device)
        resolve_dtype(self.dtype)
        if self.out is not None:
            check_folder(self.out)


def check_least(name: str, value: int | None, least: int = 1) -> None:
    """InputError where an option is given and too small."""
    if value is not None and value < least:
        raise InputError(f"--{name.replace('_', '-')} is {value}; give {least} or more")


def open_model(options: Options) -> tuple[LanguageModel, TextTokenizer]:
    """InputError where one is missing."""
    path = options.model
    load_config(path)  # before a large file is read
    tokenizer = load_tokenizer(path)
    model = load(path, device=str(resolve_device(options.device)), dtype=options.dtype)
    return model, TextTokenizer(tokenizer, model.config.vocab_size)


def open_results(options: Options, model: LanguageModel, tokenizer: TextTokenizer) -> Results:
    folder = default_folder(options.model) if options.out is None else options.out
    return Results(folder, str(options.model), identity(model, tokenizer))
