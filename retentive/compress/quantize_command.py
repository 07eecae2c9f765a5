"""`retentive quantize`: a model folder with weights of 16, 8 or 4 bits, for every command."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from retentive.arguments import parse
from retentive.compress.quantize import check_source, quantize, scheme_bits
from retentive.convert.loading import load, load_config
from retentive.data.tokenizer import FILE, copy_tokenizer
from retentive.io.folders import check_new, new_folder
from retentive.models.checkpoint import WEIGHTS, save_model


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    """A model folder, or the folder of a training run."""
    out: Annotated[
        tyro.conf.Positional[Path | None],
        tyro.conf.arg(metavar="OUT", help_behavior_hint="(default: MODEL-TO)"),
    ] = None
    """The folder to write; by default beside the model."""
    to: str = "int8"
    """bf16, int8 or int4."""


def main(argv: Sequence[str]) -> None:
    options = parse(
        Options,
        argv,
        "retentive quantize",
        "Writes a model with smaller weights: less to store, and less to read for every token.",
    )
    bits = scheme_bits(options.to)
    source = options.model.expanduser()
    beside = source.with_name(f"{source.resolve().name}-{options.to}")
    out = beside if options.out is None else options.out.expanduser()
    check_new(out)
    check_source(load_config(source))  # before the weights are read
    model = load(source)
    before = sum(x.nbytes for x in model.state_dict().values()) / 1e6
    if (source / WEIGHTS).is_file():
        before = (source / WEIGHTS).stat().st_size / 1e6
    made = quantize(model, bits)
    with new_folder(out) as folder:
        save_model(made, folder)
        has_tokenizer = copy_tokenizer(source, folder)
    if not has_tokenizer:
        print(f"{source} holds no {FILE}: none is in {out}")
    after = (out / WEIGHTS).stat().st_size / 1e6
    print(f"wrote {out}: {after:.1f} MB of weights, {after / before:.1%} of {source}'s")
