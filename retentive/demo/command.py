"""`retentive demo`: trains a small RetNet on Python's own sources and shows its properties."""

import lzma
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from retentive.arguments import parse
from retentive.bench.along import TIMED, Mark, measure_along
from retentive.convert.loading import load, load_tokenizer
from retentive.data.dataset import Corpus, prepare
from retentive.demo import figures
from retentive.devices import resolve_device
from retentive.errors import InputError
from retentive.inference.generate import generate
from retentive.models.language_model import LanguageModel
from retentive.ops import FORMS
from retentive.reports.tables import console, new_table, size
from retentive.train.checkpoints import OtherRun, RunFolder
from retentive.train.config import RunConfig, load_config
from retentive.train.loop import Result, train
from retentive.train.metrics import read_metrics

# No line end at its end: the tokenizer joins line ends to the indentation that follows them.
PROMPT = 'def read_lines(path, encoding="utf-8"):'
TOKENS = 16_000  # decoded to show that a token's cost does not grow
FORM_TOKENS = 4096  # read in each form
CONTENDERS = {"RetNet": "retnet", "Transformer": "transformer"}  # their names in the benchmarks


@dataclass(frozen=True)
class Options:
    out: Path = Path("runs/demo")
    """The run folder: in the end a model folder, with the demo's figures."""
    device: str = "auto"
    """cpu, cuda, cuda:N, mps or auto."""


def main(argv: Sequence[str]) -> None:
    description = "Trains a small RetNet on Python's own sources, then shows its properties."
    options = parse(Options, argv, "retentive demo", description)
    config = load_config(Path(__file__).with_name("demo.toml"))
    config = replace(config, train=replace(config.train, device=options.device))
    demonstrate(config, options.out, TOKENS)


def demonstrate(config: RunConfig, folder: Path, tokens: int) -> None:
    out, device = console(), str(resolve_device(config.train.device))
    began = time.perf_counter()
    _part(out, "1. Training")
    result = trained(config, folder, out)
    if not result.finished:
        out.print(f"stopped after step {result.step} of {result.steps}; run it again to go on")
        return
    corpus = prepare(config.data)  # found in its cache
    model, tokenizer = load(folder, device=device), load_tokenizer(folder)
    show_curve(result, corpus, out)

    _part(out, "2. Writing")
    out.print(PROMPT, end="", style="bold", markup=False)

    def show(_row: int, text: str) -> None:
        out.print(text, end="", markup=False, soft_wrap=True)

    generate(
        model,
        tokenizer,
        PROMPT,
        max_new_tokens=120,
        temperature=0.7,
        repetition_penalty=1.1,  # without it, so small a model repeats itself
        on_text=show,
    )
    out.print()

    _part(out, "3. One model, three forms")
    show_forms(model, corpus, out)

    _part(out, f"4. Decoding {tokens:,} tokens")
    show_decoding(folder, tokens, device, out)
    minutes = (time.perf_counter() - began) / 60
    _part(out, f"Done in {minutes:.1f} minutes")
    out.print(f"figures: {', '.join(str(path) for path in sorted(folder.glob('*.png')))}")
    out.print(f"go on with: retentive generate {folder} --prompt 'import os'")


def _part(out: Console, heading: str) -> None:
    out.print()
    out.rule(f"[bold]{heading}", align="left")


def trained(config: RunConfig, folder: Path, out: Console) -> Result:
    """The run in `folder`: started, resumed, or found finished."""
    newest = RunFolder(folder).newest()
    done = int(newest.name.removeprefix("step-")) if newest else 0
    if done >= config.train.steps:
        out.print(f"{folder} holds the trained model already: training is skipped")
    elif done:
        out.print(f"{folder} holds a run at step {done}: going on with it")
    try:
        return train(config, folder, resume=(folder / "checkpoints").is_dir())
    except OtherRun as error:  # its advice is for `retentive train`
        reason = str(error).rpartition("; ")[0]
        raise InputError(
            f"{reason}; remove {folder}, or train elsewhere: retentive demo --out FOLDER"
        ) from error


def show_curve(result: Result, corpus: Corpus, out: Console) -> None:
    """Bits per byte of the held-out files over training, beside those of xz -9."""
    records = read_metrics(result.folder / "metrics.jsonl")
    updates = [record for record in records if "loss" in record]
    totals = np.cumsum([r["tokens"] for r in updates]).tolist()
    read = {r["step"]: n for r, n in zip(updates, totals, strict=True)}
    seconds = {record["step"]: record["seconds"] for record in updates}
    bits_per_nat = corpus.train.num_tokens / corpus.train.num_bytes / math.log(2)
    training = [(read[r["step"]] / 1e6, r["loss"] * bits_per_nat) for r in updates]
    valid = [r for r in records if "bits_per_byte" in r]
    xz = xz_bits_per_byte(corpus)
    sampled = [(read[r["step"]] / 1e6, r["bits_per_byte"]) for r in valid[:-1]]
    held_out = valid[-1]["bits_per_byte"]
    figures.learning_curve(training, sampled, held_out, xz, result.folder / "bits-per-byte")

    table = new_table("", ["step", "tokens read", "minutes", "bits per byte"])
    for record in valid:
        step = record["step"]
        minutes = f"{seconds[step] / 60:.1f}"
        if record is valid[-1]:
            table.add_section()
        table.add_row(str(step), f"{read[step]:,}", minutes, f"{record['bits_per_byte']:.3f}")
    table.add_row("", "", "xz -9", f"{xz:.3f}")
    out.print(table)
    out.print(
        f"The last two are of all {corpus.valid.num_documents} held-out files "
        f"({corpus.valid.num_bytes:,} bytes; xz packs them as one), the others of some of them."
    )


def xz_bits_per_byte(corpus: Corpus) -> float:
    """Of the held-out documents in one archive, which is the most favourable for xz."""
    text = "".join(document.text for document in corpus.valid_documents()).encode()
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


@torch.inference_mode()
def show_forms(model: LanguageModel, corpus: Corpus, out: Console) -> None:
    """The logits of held-out tokens in every form, against those of the parallel form."""
    tokens = torch.from_numpy(corpus.valid.tokens[:FORM_TOKENS].astype(np.int64))[None]
    tokens = tokens.to(model.device)
    logits = {form: model.set_kernels(form=form)(tokens)[0] for form in FORMS}
    model.set_kernels(form="auto")
    reference = logits["parallel"]
    error = "relative L2 of the logits against the parallel form"
    table = new_table("", ["form", error], words=["form"])
    for form in FORMS:
        difference = float((logits[form] - reference).norm() / reference.norm())
        table.add_row(form, f"{difference:.1e}" if form != "parallel" else "")
    out.print(table)
    out.print(f"{tokens.shape[1]:,} held-out tokens, float32, the trained weights")


def show_decoding(folder: Path, tokens: int, device: str, out: Console) -> None:
    """Time and memory of a token along one sequence, beside a Transformer of equal parameters."""
    marks: dict[str, list[Mark]] = {}
    with Progress(console=out, transient=True) as progress:
        for name, contender in CONTENDERS.items():
            task = progress.add_task(name, total=tokens)
            marks[name] = measure_along(
                contender,
                folder,
                positions(tokens),
                device=device,
                on_mark=lambda at, task=task: progress.update(task, completed=at),
            )
    figures.time_per_token(marks, folder / "time-per-token")
    figures.memory(marks, folder / "memory")
    out.print(decoding_table(marks))
    out.print(
        "RetNet decoded every token; the Transformer (as many parameters, KV cache, random weights)"
        " decodes behind a cache filled to each position. RAM is that of the whole process."
    )


def positions(tokens: int) -> list[int]:
    """The positions to measure at: 32 even steps up to `tokens`, and one at the start."""
    step = max(TIMED, tokens // 32)
    return [TIMED, *range(max(step, 2 * TIMED), tokens + 1, step)]


def decoding_table(marks: dict[str, list[Mark]]) -> Table:
    columns = ("ms\nRetNet", "ms\nTransformer", "state\nRetNet", "\nKV cache")
    table = new_table("", ["tokens\nread", *columns, "RAM\nRetNet", "RAM\nTransformer"])
    points = list(zip(*marks.values(), strict=True))
    for index in (1, 2, 4, 8, 16, 32):  # doublings: positions are evenly spaced
        if index < len(points):
            row = points[index]
            table.add_row(
                f"{row[0].position:,}",
                *(f"{1000 * mark.seconds:.1f}" for mark in row),
                *(size(mark.state) for mark in row),
                *(size(mark.resident) for mark in row),
            )
    return table
