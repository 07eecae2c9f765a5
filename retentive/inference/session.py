"""Generation in steps: read prompts, add a token to each sequence, save and go on.

A session's rows are ragged and stop by themselves. Between two calls each row is whole: the model
has read all of its text but the last token, which `step` feeds next. So a session saved between
two steps goes on with the tokens that it would have had without the stop.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch

from retentive.data.tokenizer import TextTokenizer
from retentive.decoding import program_runner
from retentive.decoding.recurrent import Runner
from retentive.decoding.runner import runner
from retentive.errors import InputError
from retentive.inference.sampling import Sampler, Sampling
from retentive.inference.text import TextStream
from retentive.models.checkpoint import load_state
from retentive.models.fingerprint import fingerprint
from retentive.models.language_model import LanguageModel
from retentive.models.state import ModelState, concat

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SEGMENT = 2048  # tokens of prompt read at once: memory does not grow with the prompt


class Piece(NamedTuple):
    """New text of a row; `finish` says why it is the row's last: "end" (of the text) or "stop"."""

    row: int
    text: str
    finish: str | None = None


@dataclass
class Row:
    """One text: its last token, which the model has not read yet (None: the text has ended)."""

    stream: TextStream
    last: int | None = None
    finish: str | None = None


class Session:
    """Rows of text on one model. `read` prompts, then `step` as often as tokens are wanted."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: "Tokenizer",
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> None:
        """`stop`: strings that end a row and are not part of its text.

        Raises InputError for an empty one, and for a tokenizer without an end token.
        """
        if "" in stop:
            raise InputError("a stop string is empty; give at least one character")
        self.text = TextTokenizer(tokenizer, model.config.vocab_size)
        self.vocab_size = self.text.vocab_size
        self.model, self.tokenizer, self.stop = model, tokenizer, tuple(stop)
        self.sampling = sampling or Sampling()
        self.rows: list[Row] = []
        self.active: list[int] = []  # the rows that have not stopped, in the order of their states
        self.whole = True  # False within a step, and after one that was broken off
        self._stopped: dict[int, ModelState] = {}
        self._runner: Runner
        self._sampler: Sampler

    @property
    def state_bytes(self) -> int:
        """Of all rows together."""
        return self._runner.state.nbytes + sum(state.nbytes for state in self._stopped.values())

    def read(self, prompts: Sequence[str]) -> list[Piece]:
        """Reads a prompt a row, long ones in segments, and makes every row active.

        The first call starts the rows; a later one goes on with what they hold, also where a row
        had stopped, and returns what was held back of their texts. An empty prompt begins a
        document. Raises InputError for an empty one to go on with, and for a wrong number.
        """
        self._check_whole()
        encoded = [self._encode(prompt) for prompt in prompts]
        if not encoded:
            raise InputError("there is no prompt; give at least one")
        if self.rows and len(encoded) != len(self.rows):
            raise InputError(
                f"there are {len(self.rows)} sequences to go on with and {len(encoded)} prompts; "
                "give one prompt per sequence, or none"
            )
        held = self.held()
        if self.rows:
            state = self._all_states()
            unread = [[] if row.last is None else [row.last] for row in self.rows]
        else:
            state = self.model.init_state(len(encoded))
            self._sampler = self._new_sampler(len(encoded))
            unread = [self.text.before for _ in encoded]
        # Without a prompt a document begins as others end: at the end token
        text = [
            [*before, *tokens] or [self.text.end]
            for before, tokens in zip(unread, encoded, strict=True)
        ]
        state = read_tokens(self.model, [tokens[:-1] for tokens in text], state)
        self._runner = runner(self.model, state)
        self._stopped, self.active = {}, list(range(len(text)))
        self.rows = [
            Row(TextStream(self.tokenizer, self.stop, prompt), tokens[-1])
            for prompt, tokens in zip(encoded, text, strict=True)
        ]
        for row, tokens in enumerate(encoded):
            self._sampler.observe(row, tokens)
        return held

    @torch.inference_mode()
    def step(self) -> list[Piece]:
        """One more token for each active row: the text this makes certain, row by row.

        Raises InputError after a step that was broken off: some layers had read its token.

        A row's text may be empty (a character not yet whole, a stop string perhaps beginning).
        """
        self._check_whole()
        if not self.active:
            return []
        self.whole = False
        last = torch.tensor([self.rows[row].last for row in self.active], device=self.model.device)
        logits = self._runner.step(last)[:, : self.vocab_size]
        tokens = self._sampler.draw(logits, self.active).tolist()
        pieces = [self._take(row, token) for row, token in zip(self.active, tokens, strict=True)]
        if any(piece.finish for piece in pieces):
            self._retire()
        self.whole = True
        return pieces

    def steps(self, max_new_tokens: int) -> Iterator[list[Piece]]:
        """`step` until each row has stopped or has as many new tokens."""
        for _ in range(max_new_tokens):
            if not self.active:
                return
            yield self.step()

    def held(self) -> list[Piece]:
        """Text that waits for what follows: a stop string may be beginning there."""
        return [Piece(i, row.stream.held) for i, row in enumerate(self.rows) if row.stream.held]

    def save(self, path: str | Path) -> None:
        """Everything that `load` needs to go on, in one safetensors file."""
        assert self.whole
        rows = [{"last": row.last, "stream": row.stream.as_dict()} for row in self.rows]
        self._all_states().save(
            path,
            fingerprint=fingerprint(self.model),
            extra={"sampling": dataclasses.asdict(self.sampling), "stop": self.stop, "rows": rows},
            tensors=self._sampler.tensors(),
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: LanguageModel,
        tokenizer: "Tokenizer",
        *,
        sampling: dict[str, Any] | None = None,
        stop: Sequence[str] | None = None,
    ) -> Self:
        """The session that was saved in `path`, its rows active unless their text has ended.

        `sampling` overrides single options of those it was saved with; a new seed draws anew.
        Raises InputError for a file of another model or tokenizer, or one that is no session's.
        """
        state, extra, tensors = load_state(path, model)
        if not {"sampling", "stop", "rows"} <= extra.keys():
            raise InputError(
                f"{path} holds a state but no text; give a file that --save-state wrote"
            )
        options = {**extra["sampling"], **(sampling or {})}
        session = cls(
            model, tokenizer, Sampling(**options), extra["stop"] if stop is None else stop
        )
        saved_size = tensors["seen"].shape[1]
        if saved_size != session.vocab_size:
            raise InputError(
                f"the texts in {path} are of a tokenizer with {saved_size} tokens, this one has "
                f"{session.vocab_size}; give the tokenizer.json that they were written with"
            )
        for saved in extra["rows"]:
            stream = TextStream.from_dict(saved["stream"], tokenizer, session.stop)
            finish = "end" if saved["last"] is None else None
            session.rows.append(Row(stream, saved["last"], finish))
        session._sampler = session._new_sampler(len(session.rows))
        session._sampler.restore(tensors, draws="seed" not in (sampling or {}))
        session._runner, session.active = runner(model, state), list(range(len(session.rows)))
        session._retire()
        return session

    def _check_whole(self) -> None:
        if not self.whole:
            raise InputError("a step was broken off; load the session, or start it anew")

    def _encode(self, prompt: str) -> list[int]:
        try:
            prompt.encode()
        except UnicodeEncodeError:  # bytes of a command line that are no text
            raise InputError("a prompt is not UTF-8; convert it first") from None
        tokens = self.text.encode(prompt, begin=False)
        if not tokens and self.rows:
            raise InputError("a prompt is empty; give at least one character to go on from")
        return tokens

    def _new_sampler(self, rows: int) -> Sampler:
        return Sampler(self.sampling, rows, self.vocab_size, self.model.device)

    def _take(self, index: int, token: int) -> Piece:
        row = self.rows[index]
        if token == self.text.end:
            row.last, row.finish = None, "end"
            held, row.stream.held = row.stream.held, ""
            return Piece(index, held, "end")
        row.last = token
        text = row.stream.push(token)
        if row.stream.stopped:
            row.finish = "stop"
        return Piece(index, text, row.finish)

    def _retire(self) -> None:
        """Takes the rows that have stopped out of the batch; their states are kept."""
        for place, row in enumerate(self.active):
            if self.rows[row].finish:
                self._stopped[row] = self._runner.state.select([place])
        going = [place for place, row in enumerate(self.active) if not self.rows[row].finish]
        self._runner = runner(self.model, self._runner.state.select(going))
        self.active = [self.active[place] for place in going]

    def _all_states(self) -> ModelState:
        """The states of all rows, in their order."""
        if not self._stopped:
            return self._runner.state
        order = [*self.active, *self._stopped]
        together = concat([self._runner.state, *self._stopped.values()])
        return together.select([order.index(row) for row in range(len(self.rows))])


def read_tokens(model: LanguageModel, rows: Sequence[list[int]], state: ModelState) -> ModelState:
    """The state after each row has read its tokens: ragged rows, at most SEGMENT tokens at once.

    A few tokens, as many in each row, are read by a program.
    """
    at = 0
    while going := sum(len(tokens) > at for tokens in rows):
        width = max(1, SEGMENT // going)
        segments = [tokens[at : at + width] for tokens in rows]
        if program_runner.reads(model, segments):
            state = program_runner.read(model, segments, state)
        else:
            state = _read_ragged(model, segments, state)
        at += width
    return state


@torch.inference_mode()
def _read_ragged(model: LanguageModel, rows: Sequence[list[int]], state: ModelState) -> ModelState:
    longest = max(map(len, rows))
    padded = [[*tokens, *[0] * (longest - len(tokens))] for tokens in rows]
    tokens = torch.tensor(padded, device=model.device)
    lengths = torch.tensor([[len(tokens)] for tokens in rows], device=model.device)
    real = torch.arange(longest, device=model.device) < lengths
    layout = model.layout(tokens, state, real)
    _, after = model.hidden(layout.unpad(tokens), state, layout=layout)
    assert after is not None
    return after
