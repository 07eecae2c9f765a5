"""`retentive export`: a trained RetNet for onnxruntime, or for torch without this package."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from retentive.arguments import parse
from retentive.compress.export import check_format, export
from retentive.convert.loading import load, load_tokenizer
from retentive.data.tokenizer import FILE, copy_tokenizer
from retentive.io.folders import check_new


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    """A model folder, or the folder of a training run."""
    out: Annotated[
        tyro.conf.Positional[Path | None],
        tyro.conf.arg(metavar="OUT", help_behavior_hint="(default: MODEL-FORMAT)"),
    ] = None
    """The folder to write; by default beside the model."""
    format: str = "onnx"
    """onnx or torch-export."""


def main(argv: Sequence[str]) -> None:
    options = parse(
        Options,
        argv,
        "retentive export",
        "Writes a RetNet as two graphs, a prefill and a step, checked against the model.",
    )
    check_format(options.format)
    model_folder = options.model.expanduser()
    beside = model_folder.with_name(f"{model_folder.resolve().name}-{options.format}")
    out = beside if options.out is None else options.out.expanduser()
    check_new(out)
    model = load(model_folder)
    has_tokenizer = (model_folder / FILE).is_file()
    tokenizer = load_tokenizer(model_folder) if has_tokenizer else None
    print("tracing both graphs and checking them, up to a few minutes", flush=True)
    errors = export(model, out, options.format, tokenizer)
    print(
        f"checked against the model: relative error {errors.logits:.1e} in the logits,"
        f" {errors.state:.1e} in the state (at most {errors.allowed:.0e})"
    )
    if not copy_tokenizer(model_folder, out):
        print(f"{model_folder} holds no {FILE}: none is in {out}")
    print(f"wrote {out}")
