"""`retentive demo`: trains a small RetNet on Python's own sources and shows what it can do."""

import lzma
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from retentive.arguments import parse
from retentive.bench.contenders import Entry, chosen
from retentive.bench.decode import Measure, walk
from retentive.bench.models import subject
from retentive.bench.peers import Unavailable
from retentive.bench.processes import Process
from retentive.bench.workers.along import TIMED
from retentive.data.dataset import Corpus, prepare
from retentive.data.tokenizer import load_tokenizer
from retentive.demo import figures
from retentive.devices import resolve_device
from retentive.errors import InputError
from retentive.inference.generate import generate
from retentive.info import size
from retentive.models.checkpoint import load
from retentive.models.language_model import LanguageModel
from retentive.ops import FORMS
from retentive.train.checkpoints import OtherRun, RunFolder
from retentive.train.config import RunConfig, load_config
from retentive.train.loop import Result, train
from retentive.train.metrics import read_metrics

# No line end at its end: the tokenizer joins line ends to the indentation that follows them.
PROMPT = 'def read_lines(path, encoding="utf-8"):'
TOKENS = 16_000  # decoded to show that a token's cost does not grow
FORM_TOKENS = 4096  # read in each form
CONTENDERS = {"RetNet": "retnet", "Transformer": "transformer"}  # as the benchmarks call them


@dataclass(frozen=True)
class Options:
    out: Path = Path("runs/demo")
    """The run folder: a model folder in the end, with the demo's pictures."""
    device: str = "auto"
    """cpu, cuda, cuda:N, mps or auto."""


def main(argv: Sequence[str]) -> None:
    description = "Trains a small RetNet on Python's own sources, then shows what it can do."
    options = parse(Options, argv, "retentive demo", description)
    config = load_config(Path(__file__).with_name("demo.toml"))
    config = replace(config, train=replace(config.train, device=options.device))
    demonstrate(config, options.out, TOKENS)


def demonstrate(config: RunConfig, folder: Path, tokens: int) -> None:
    console, device = Console(highlight=False), str(resolve_device(config.train.device))
    began = time.perf_counter()
    _part(console, "1. Training")
    result = trained(config, folder, console)
    if not result.finished:
        console.print(f"stopped after step {result.step} of {result.steps}; run it again to go on")
        return
    corpus = prepare(config.data)  # found in its cache
    model, tokenizer = load(folder, device=device), load_tokenizer(folder)
    show_curve(result, corpus, console)

    _part(console, "2. Writing")
    console.print(PROMPT, end="", style="bold", markup=False)

    def show(_row: int, text: str) -> None:
        console.print(text, end="", markup=False, soft_wrap=True)

    generate(
        model,
        tokenizer,
        PROMPT,
        max_new_tokens=120,
        temperature=0.7,
        repetition_penalty=1.1,  # without, a model as small as this repeats itself
        on_text=show,
    )
    console.print()

    _part(console, "3. One model, three forms")
    show_forms(model, corpus, console)

    _part(console, f"4. Decoding {tokens:,} tokens")
    show_decoding(folder, tokens, device, console)
    minutes = (time.perf_counter() - began) / 60
    _part(console, f"Done in {minutes:.1f} minutes")
    console.print(f"pictures: {', '.join(str(path) for path in sorted(folder.glob('*.png')))}")
    console.print(f"go on with: retentive generate {folder} --prompt 'import os'")


def _part(console: Console, heading: str) -> None:
    console.print()
    console.rule(f"[bold]{heading}", align="left")


def trained(config: RunConfig, folder: Path, console: Console) -> Result:
    """The run in `folder`: begun, gone on with, or found finished."""
    newest = RunFolder(folder).newest()
    done = int(newest.name.removeprefix("step-")) if newest else 0
    if done >= config.train.steps:
        console.print(f"{folder} holds the trained model already: training is skipped")
    elif done:
        console.print(f"{folder} holds a run that has come to step {done}: going on with it")
    try:
        return train(config, folder, resume=(folder / "checkpoints").is_dir())
    except OtherRun as error:  # its advice is for `retentive train`
        reason = str(error).rpartition("; ")[0]
        raise InputError(
            f"{reason}; remove {folder}, or train elsewhere: retentive demo --out FOLDER"
        ) from error


def show_curve(result: Result, corpus: Corpus, console: Console) -> None:
    """Bits per byte of the held-out files over training, beside what xz -9 makes of them."""
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
    picture = result.folder / "bits-per-byte.png"
    figures.learning_curve(training, sampled, held_out, xz, picture)

    table = Table()
    for heading in ("step", "tokens read", "minutes", "bits per byte"):
        table.add_column(heading, justify="right")
    for record in valid:
        step = record["step"]
        minutes = f"{seconds[step] / 60:.1f}"
        if record is valid[-1]:
            table.add_section()
        table.add_row(str(step), f"{read[step]:,}", minutes, f"{record['bits_per_byte']:.3f}")
    table.add_row("", "", "xz -9", f"{xz:.3f}")
    console.print(table)
    console.print(
        f"The last two are of all {corpus.valid.num_documents} held-out files "
        f"({corpus.valid.num_bytes:,} bytes; xz packs them as one), the others of some of them."
    )


def xz_bits_per_byte(corpus: Corpus) -> float:
    """Of the held-out documents in one archive, which is the most favourable for xz."""
    text = "".join(document.text for document in corpus.valid_documents()).encode()
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


@torch.inference_mode()
def show_forms(model: LanguageModel, corpus: Corpus, console: Console) -> None:
    """Logits of a held-out text in every form, against the parallel form."""
    tokens = torch.from_numpy(corpus.valid.tokens[:FORM_TOKENS].astype(np.int64))[None]
    tokens = tokens.to(model.device)
    logits = {form: model.set_kernels(form=form)(tokens)[0] for form in FORMS}
    model.set_kernels(form="auto")
    reference = logits["parallel"]
    table = Table()
    table.add_column("form")
    table.add_column("relative L2 of the logits against the parallel form", justify="right")
    for form in FORMS:
        error = float((logits[form] - reference).norm() / reference.norm())
        table.add_row(form, f"{error:.1e}" if form != "parallel" else "")
    console.print(table)
    console.print(f"{tokens.shape[1]:,} held-out tokens, float32, the trained weights")


def show_decoding(folder: Path, tokens: int, device: str, console: Console) -> None:
    """Time and memory of a token as the text grows, beside a Transformer of equal parameters."""
    measures: dict[str, list[Measure]] = {}
    with Progress(console=console, transient=True) as progress:
        for name in CONTENDERS:
            task = progress.add_task(name, total=tokens)
            measures[name] = measure(
                name,
                folder,
                tokens,
                device,
                lambda at, task=task: progress.update(task, completed=at),
            )
    figures.time_per_token(measures, folder / "time-per-token.png")
    figures.memory(measures, folder / "memory.png")
    console.print(decoding_table(measures))
    console.print(
        "RetNet decoded every token; the Transformer (as many parameters, KV cache, random weights)"
        " decodes behind a cache filled to each position. RAM is that of the whole process."
    )


def measure(
    name: str, folder: Path, tokens: int, device: str, reached: Callable[[int], None]
) -> list[Measure]:
    """A contender decoding one text in a process of its own; `reached` hears of the positions.

    The Transformer has random weights, with which it is as fast.
    """
    (contender,) = chosen("along", CONTENDERS[name])
    threads = torch.get_num_threads()
    case = {"task": "along", "device": device, "dtype": "float32", "threads": threads}
    case |= {"batch": 1, "marks": positions(tokens), "keep_states": False}
    process = Process(contender.worker, threads)
    try:
        return walk(process, Entry(contender, subject(str(folder))), case, reached)
    except Unavailable as reason:
        raise InputError(f"the {name} of the demo could not be measured: {reason}") from None
    finally:
        process.close()


def positions(tokens: int) -> list[int]:
    """Where to measure: 32 steps to `tokens`, and the start."""
    step = max(TIMED, tokens // 32)
    return [TIMED, *range(max(step, 2 * TIMED), tokens + 1, step)]


def decoding_table(measures: dict[str, list[Measure]]) -> Table:
    table = Table()
    for heading in (
        "tokens\nread",
        *("ms\nRetNet", "ms\nTransformer"),
        *("state\nRetNet", "\nKV cache"),
        *("RAM\nRetNet", "RAM\nTransformer"),
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    points = list(zip(*measures.values(), strict=True))
    for index in (1, 2, 4, 8, 16, 32):  # doublings: positions are evenly spaced
        if index < len(points):
            row = points[index]
            table.add_row(
                f"{row[0].position:,}",
                *(f"{1000 * at.seconds:.1f}" for at in row),
                *(size(at.state) for at in row),
                *(f"{at.resident / 2**20:.0f} MiB" for at in row),
            )
    return table
