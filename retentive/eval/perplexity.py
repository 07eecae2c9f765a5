"""`retentive eval perplexity`: loss on texts, whole and by windows, as a function of position.

A text is read behind the token that texts begin with, and each of its tokens is predicted once.
Whole means with the state carried from its first token to its last, in memory that does not grow
with it. By windows means in rows that begin with an empty state: what differs is what context
beyond the window is worth.

Shapes: T tokens of a document, B rows, W tokens of a window.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated

import torch
import tyro
from torch import Tensor

from retentive.data.corpus import Document, read_documents
from retentive.data.tokenizer import encode, token_bytes
from retentive.errors import InputError
from retentive.eval.curves import BLOCK
from retentive.eval.options import Options, check_least, open_model, open_results
from retentive.eval.perplexity_report import Measured, Reading, Report
from retentive.eval.progress import Display
from retentive.eval.results import Results
from retentive.eval.scores import log_likelihoods
from retentive.models.counts import half_lives
from retentive.models.language_model import LanguageModel

SEGMENT = 2048  # tokens of a whole document read at once

Advance = Callable[[int], None]


@dataclass(frozen=True)
class TextOptions:
    text_field: str = "text"
    """The field of a JSON line that holds the text."""
    skip_undecodable: bool = False
    """Leave out what is binary or not UTF-8."""


@dataclass(frozen=True)
class PerplexityOptions(Options):
    texts: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="TEXT...", help_behavior_hint="(required)"),
    ] = field(kw_only=True)
    """Files (.txt, .jsonl, any text; also .gz, .xz), folders, globs, or stdlib: Python's own. Form
    feeds separate documents in a .txt."""
    windows: tuple[int, ...] = (2048,)
    """Read in rows of so many tokens, too, each from an empty state; several give a curve each."""
    stride: Annotated[int | None, tyro.conf.arg(help_behavior_hint="(default: half)")] = None
    """Tokens from one row to the next: those of a row that the row before has not predicted."""
    max_tokens: int | None = None
    """Of each document only so many."""
    limit: int | None = None
    """Only so many documents."""
    data: TextOptions = TextOptions()

    def check(self) -> None:
        super().check()
        if not self.texts:
            raise InputError(
                "there is no text to read; give files, folders, globs or stdlib behind the model"
            )
        for name in ("max_tokens", "limit", "stride"):
            check_least(name, getattr(self, name))
        for window in self.windows:
            check_least("windows", window)
            if self.stride is not None and self.stride > window:
                raise InputError(
                    f"--stride is {self.stride}, longer than the window of {window}: tokens between"
                    " would have no prediction; give at most the window"
                )

    def documents(self) -> Iterator[Document]:
        """Those that are asked for. InputError where there is none."""
        found = read_documents(
            self.texts,
            text_field=self.data.text_field,
            skip_undecodable=self.data.skip_undecodable,
        )
        number = 0
        for number, document in enumerate(found, 1):
            yield document
            if number == self.limit:
                return
        if not number:
            raise InputError(f"there is no text in {', '.join(self.texts)}; give one that has some")

    def readings(self, model: LanguageModel) -> list[Reading]:
        whole = [] if model.state_grows else [Reading()]
        windows = [Reading(w, self.stride or max(1, w // 2)) for w in dict.fromkeys(self.windows)]
        if not whole and not windows:
            raise InputError(
                "the state of this model grows with the sequence: read by windows; give --windows"
            )
        return whole + windows


def run(options: PerplexityOptions) -> None:
    """Raises InputError for what the options, the texts and the model refuse."""
    options.check()
    total = sum(len(document.text) for document in options.documents())
    model, tokenizer = open_model(options)
    readings = options.readings(model)
    report = Report(
        str(options.model), options.dtype, options.max_tokens, half_lives(model.config), readings
    )
    with (
        open_results(options, model, tokenizer) as results,
        Display(total * len(readings), "characters") as display,
    ):
        for document in options.documents():
            ids = torch.from_numpy(next(encode(tokenizer.tokenizer, [document.text])))
            tokenizer.check(ids.tolist())
            if not len(ids):  # a tokenizer may leave out what it does not know
                continue
            length = len(document.text.encode())
            if options.max_tokens is not None and len(ids) > options.max_tokens:
                ids = ids[: options.max_tokens]
                length = int(token_bytes(tokenizer.tokenizer)[ids].sum())
            tokens = torch.cat([torch.tensor([tokenizer.begin]), ids])
            measured = [
                _measured(model, tokens, reading, options.batch_size, results, display, document)
                for reading in readings
            ]
            report.add(document.name, len(ids), length, measured)
        if not report.documents:
            raise InputError(f"the tokenizer in {options.model} makes no token of these texts")
        results.save("perplexity", report.to_dict())
        report.draw(results.folder)
    report.show(results.folder)


def _measured(
    model: LanguageModel,
    tokens: Tensor,
    reading: Reading,
    batch_size: int,
    results: Results,
    display: Display,
    document: Document,
) -> Measured:
    """The losses of a document, of an earlier run if that had finished it."""
    size, count = len(document.text), len(tokens) - 1
    digest = hashlib.blake2b(tokens.numpy().tobytes(), digest_size=16).hexdigest()
    key = results.key("perplexity", digest, BLOCK, *reading)
    if (known := results.get(key)) is not None:
        display.skip(size)
        return Measured(**known)
    done = 0

    def advance(tokens: int) -> None:
        nonlocal done
        before, done = done, done + tokens
        display.advance(done * size // count - before * size // count, reading.name)

    losses, state_bytes = document_losses(model, tokens, reading, batch_size, advance)
    measured = Measured([float(block.sum()) for block in losses.split(BLOCK)], state_bytes)
    results.add(key, measured._asdict())
    return measured


def document_losses(
    model: LanguageModel,
    tokens: Tensor,
    reading: Reading,
    batch_size: int,
    advance: Advance = lambda tokens: None,
) -> tuple[Tensor, int]:
    """Nats of each token behind the first, float64 `[T]` of int64 `[T+1]`, and the state's bytes.

    `advance` is told of tokens as they are done.
    """
    if reading.window is None:
        return _whole(model, tokens, advance)
    assert reading.stride is not None
    return _windows(model, tokens, reading.window, reading.stride, batch_size, advance), 0


@torch.inference_mode()
def _whole(model: LanguageModel, tokens: Tensor, advance: Advance) -> tuple[Tensor, int]:
    state, losses = model.init_state(1), []
    targets = tokens[1:]
    for start in range(0, len(targets), SEGMENT):
        target = targets[start : start + SEGMENT].to(model.device)
        inputs = tokens[start : start + len(target)].to(model.device)
        h, after = model.hidden(inputs[None], state)
        assert after is not None
        found, _ = log_likelihoods(
            model, h[0], torch.arange(len(target), device=model.device), target
        )
        losses.append(-found.double().cpu())
        state = after
        advance(len(target))
    return torch.cat(losses), state.nbytes


@torch.inference_mode()
def _windows(
    model: LanguageModel,
    tokens: Tensor,
    window: int,
    stride: int,
    batch_size: int,
    advance: Advance,
) -> Tensor:
    """The rows `[B,W]` begin `stride` apart; of each those tokens count that none before had."""
    count = len(tokens) - 1
    losses = torch.empty(count, dtype=torch.float64)
    padded = torch.nn.functional.pad(tokens, (0, window))  # behind the last row
    rows = -(-max(0, count - window) // stride) + 1
    for first in range(0, rows, batch_size):
        starts = [row * stride for row in range(first, min(first + batch_size, rows))]
        wide = min(window, count - starts[0])
        inputs = torch.stack([padded[start : start + wide] for start in starts])
        h, _ = model.hidden(inputs.to(model.device))
        begins = [start + window - stride if start else 0 for start in starts]
        stops = [min(start + window, count) for start in starts]
        mine = torch.cat([torch.arange(a, b) for a, b in zip(begins, stops, strict=True)])
        lengths = torch.tensor([b - a for a, b in zip(begins, stops, strict=True)])
        shift = torch.tensor([row * wide - start for row, start in enumerate(starts)])
        places = mine + shift.repeat_interleave(lengths)
        targets = tokens[mine + 1].to(model.device)
        found, _ = log_likelihoods(model, h.flatten(0, 1), places.to(model.device), targets)
        losses[mine] = -found.double().cpu()
        advance(len(mine))
    return losses
