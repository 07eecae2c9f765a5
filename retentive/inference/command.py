"""`retentive generate`: text from a trained model, streamed; saved and gone on with."""

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

import torch
import tyro

from retentive.adapters.loading import load_adapted, refuse_adapter
from retentive.arguments import parse
from retentive.convert.loading import load, load_tokenizer
from retentive.decoding.runner import fastest_threads
from retentive.devices import resolve_device
from retentive.errors import InputError
from retentive.inference.sampling import Sampling
from retentive.inference.session import Piece, Session

_SAMPLING = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p", "seed")


def _left_out(metavar: str, default: object) -> Any:
    """How the help shows an option that is None where it was not given."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


@dataclass(frozen=True)
class Options:
    """With --load-state, options that are left out are as they were when the state was saved."""

    model: tyro.conf.Positional[Path]
    """A model folder, or the folder of a training run."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to go on from; several are written at once. Without any, standard input is it."""
    max_new_tokens: int = 128
    """New tokens per sequence, at most; 0 only reads the prompt (for --save-state)."""
    temperature: Annotated[float | None, _left_out("FLOAT", Sampling.temperature)] = None
    """Divides the logits; 0 is greedy."""
    top_k: Annotated[int | None, _left_out("INT", "all")] = None
    """Keep the k likeliest tokens."""
    top_p: Annotated[float | None, _left_out("FLOAT", Sampling.top_p)] = None
    """Keep the fewest likeliest tokens that hold this much probability."""
    min_p: Annotated[float | None, _left_out("FLOAT", Sampling.min_p)] = None
    """Drop tokens less likely than this fraction of the likeliest."""
    repetition_penalty: Annotated[float | None, _left_out("FLOAT", Sampling.repetition_penalty)] = (
        None
    )
    """Weaken the tokens already in the sequence; 1 is off."""
    seed: Annotated[int | None, _left_out("INT", Sampling.seed)] = None
    """The text is the same for the same seed."""
    adapter: Annotated[Path | None, _left_out("FOLDER", "none")] = None
    """A LoRA adapter or a tuned state of this model, as training writes it."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """End a sequence before this string; may be given several times."""
    save_state: Annotated[Path | None, _left_out("FILE", "none")] = None
    """Write here the state of the sequences, to go on with them."""
    load_state: Annotated[Path | None, _left_out("FILE", "none")] = None
    """Go on with the sequences saved here; a --prompt for each is added to it."""
    device: str = "auto"
    """cpu, cuda, cuda:N, mps or auto."""
    dtype: str = "float32"
    """float32, bfloat16, float16 or float64."""

    def sampling(self) -> dict[str, Any]:
        """The sampling options that were given."""
        given = {name: getattr(self, name) for name in _SAMPLING}
        return {name: value for name, value in given.items() if value is not None}


def main(argv: Sequence[str]) -> int | None:
    options = parse(
        Options,
        argv,
        "retentive generate",
        "Goes on from prompts; prints the text as it is written.",
    )
    if options.max_new_tokens < (0 if options.save_state else 1):
        raise InputError(
            f"--max-new-tokens is {options.max_new_tokens}; give 1 or more (0 with --save-state)"
        )
    Sampling(**options.sampling())  # refused before the model is loaded
    if options.save_state is not None:
        _check_writable(options.save_state)
    prompts = options.prompt
    if not prompts and options.load_state is None:
        prompts = (_standard_input(),)

    device = resolve_device(options.device)
    place = {"device": str(device), "dtype": options.dtype}
    if options.adapter is None:
        refuse_adapter(options.model)
        model = load(options.model, **place)
    else:
        model = load_adapted(options.model, options.adapter, **place)
    tokenizer = load_tokenizer(options.model)
    if options.load_state is not None:
        session = Session.load(
            options.load_state,
            model,
            tokenizer,
            sampling=options.sampling(),
            stop=options.stop or None,
        )
        if not prompts and not session.active:
            raise InputError(f"every text in {options.load_state} has ended; add a --prompt to it")
    else:
        session = Session(model, tokenizer, Sampling(**options.sampling()), options.stop)
    return _write(session, prompts, options)


def _write(session: Session, prompts: Sequence[str], options: Options) -> int:
    """Reads, writes, saves, reports. 130 where the user interrupted it, with all of this done."""
    began = time.perf_counter()
    held = session.read(prompts) if prompts else []
    read = time.perf_counter()
    printer = Printer(sys.stdout, _headings(session, prompts))
    printer.push(held)
    written = 0
    try:
        with _interruptions() as interrupted:
            _choose_threads(session, options.max_new_tokens)
            started = time.perf_counter()
            for pieces in session.steps(options.max_new_tokens):
                printer.push(pieces)
                written += len(pieces)
                if interrupted:
                    break
        seconds = time.perf_counter() - started
        printer.close([] if options.save_state else session.held())
    finally:  # also where the reader of a pipe has left
        if options.save_state is not None and session.whole:
            session.save(options.save_state)
        elif options.save_state is not None:  # a second Ctrl-C, or the step itself failed
            print(f"stopped within a step: {options.save_state} not saved", file=sys.stderr)
    if interrupted:
        print("interrupted", file=sys.stderr)
    if prompts:
        print(f"prompt read in {read - began:.2f} s", file=sys.stderr)
    if written:
        rate = f"{written} tokens in {seconds:.2f} s, {written / seconds:.1f} tokens/s"
        print(rate, file=sys.stderr)
    print(
        f"state: {session.state_bytes / len(session.rows):,.0f} bytes per sequence", file=sys.stderr
    )
    if options.save_state is not None:
        adapter = "" if options.adapter is None else f"--adapter {options.adapter} "
        again = f"retentive generate {options.model} {adapter}--load-state {options.save_state}"
        print(f"saved; go on with: {again}", file=sys.stderr)
    return 130 if interrupted else 0


def _choose_threads(session: Session, tokens: int) -> None:
    rows = len(session.active)
    if tokens and rows:
        torch.set_num_threads(fastest_threads(session.model, rows))


class Printer:
    """Several sequences on one stream: one shows as it is written, the others wait their turn."""

    def __init__(self, out: TextIO, headings: Sequence[str]) -> None:
        """`headings`: one per sequence; none is shown above a single one."""
        self.out, self.headings = out, headings
        self.shown = 0  # the text that streams now
        self.waiting = [""] * len(headings)
        self.finished = [False] * len(headings)
        self._head()

    def push(self, pieces: Sequence[Piece]) -> None:
        for row, text, finish in pieces:
            self.waiting[row] += text
            self.finished[row] |= finish is not None
        self._flush()
        while self.finished[self.shown] and self.shown + 1 < len(self.headings):
            self._next()

    def close(self, held: Sequence[Piece]) -> None:
        """What is left. A lone text in a pipe stays as it is; others end with a line end."""
        self.push(held)
        while self.shown + 1 < len(self.headings):
            self._next()
        if len(self.headings) > 1 or self.out.isatty():
            self.out.write("\n")
        self.out.flush()

    def _next(self) -> None:
        self.out.write("\n\n")
        self.shown += 1
        self._head()
        self._flush()

    def _head(self) -> None:
        if len(self.headings) > 1:
            self.out.write(f"{self.headings[self.shown]}\n")

    def _flush(self) -> None:
        self.out.write(self.waiting[self.shown])
        self.out.flush()
        self.waiting[self.shown] = ""


def _headings(session: Session, prompts: Sequence[str]) -> list[str]:
    """`== 2 of 3: ...the end of its prompt ==`"""
    count = len(session.rows)
    ends = [f": {_last_words(prompt)}" for prompt in prompts] or [""] * count
    return [f"== {i} of {count}{end} ==" for i, end in enumerate(ends, 1)]


def _last_words(prompt: str, width: int = 60) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= width else f"...{line[3 - width :]}"


@contextmanager
def _interruptions() -> Iterator[list[int]]:
    """Ctrl-C is noted in the list: a step is never left half done. A second one is obeyed."""
    noted: list[int] = []

    def note(number: int, _frame: Any) -> None:
        noted.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _standard_input() -> str:
    if sys.stdin.isatty():
        raise InputError("there is no prompt; give --prompt TEXT, or pipe one in")
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"the text on standard input is not UTF-8 (byte {error.start})") from None
    return text.removesuffix("\n")  # the one that every text file ends with


def _check_writable(path: Path) -> None:
    """Before anything is written that could then not be saved."""
    if path.is_dir():
        raise InputError(f"--save-state {path} is a folder; give a file")
    if not path.parent.is_dir():
        raise InputError(f"--save-state {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"--save-state {path}: no permission to write in {path.parent}")
