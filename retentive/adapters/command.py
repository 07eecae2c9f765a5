"""`retentive merge`: a model folder with a LoRA adapter in its weights, for every command."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from retentive.adapters.loading import holds_lora, load_adapted
from retentive.arguments import parse
from retentive.data.tokenizer import FILE, copy_tokenizer
from retentive.errors import InputError
from retentive.io.folders import check_new, new_folder
from retentive.models.checkpoint import save_model


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    """The model folder that the adapter was trained on."""
    adapter: tyro.conf.Positional[Path]
    """The folder of a LoRA adapter."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """The folder to write."""
    dtype: str = "float32"
    """Of the weights that are written: float32, bfloat16, float16 or float64."""


def main(argv: Sequence[str]) -> None:
    options = parse(
        Options,
        argv,
        "retentive merge",
        "Writes a model with an adapter merged into its weights: a model folder like any other.",
    )
    source, adapter, out = (
        path.expanduser() for path in (options.model, options.adapter, options.out)
    )
    check_new(out)
    if not holds_lora(adapter):
        raise InputError(
            f"{adapter} holds a tuned state, which is no part of the weights; generate with "
            f"--adapter {adapter}"
        )
    made = load_adapted(source, adapter, dtype=options.dtype)
    with new_folder(out) as folder:
        save_model(made, folder)
        has_tokenizer = copy_tokenizer(source, folder)
    if not has_tokenizer:
        print(f"{source} holds no {FILE}: none is in {out}")
    print(f"wrote {out}: {source} with {adapter} merged into its weights")
