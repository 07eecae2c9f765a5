"""Tokens of one row in, text that may be shown out: no character cut, no stop string leaked."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_UNDECODABLE = "\ufffd"
_PATIENCE = 32  # tokens that still decode to nothing valid are not the start of a character


class TextStream:
    """The text of one row as its tokens come.

    Two things are held back: bytes that do not make a whole character yet, and text that may be the
    beginning of a stop string. `held` is the latter; the former are simply not text. `as_dict` and
    `from_dict` carry both from one process to another, which `tokenizers.decoders.DecodeStream`
    cannot (and where a text starts with undecodable bytes, some of its versions raise).
    """

    def __init__(
        self, tokenizer: "Tokenizer", stop: Sequence[str] = (), prompt: Sequence[int] = ()
    ) -> None:
        """`prompt` is what the text follows: some tokenizers write a token by what is before it."""
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.held = ""
        self.stopped = False
        self._context = self._last_whole(prompt)
        self._pending: list[int] = []
        self._shown = len(self._decode(self._context))  # characters of context + pending

    def push(self, token: int) -> str:
        """The text that has become certain with `token`; nothing after a stop string."""
        return self._release(self._characters(token))

    def as_dict(self) -> dict[str, Any]:
        """What `from_dict` needs, as JSON."""
        return {
            "context": self._context,
            "pending": self._pending,
            "shown": self._shown,
            "held": self.held,
        }

    @classmethod
    def from_dict(
        cls, saved: dict[str, Any], tokenizer: "Tokenizer", stop: Sequence[str]
    ) -> "TextStream":
        stream = cls(tokenizer, stop)
        stream._context, stream._pending = list(saved["context"]), list(saved["pending"])
        stream._shown, stream.held = int(saved["shown"]), str(saved["held"])
        return stream

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _last_whole(self, tokens: Sequence[int]) -> list[int]:
        """The fewest last tokens that decode without a piece of a character."""
        for count in range(1, min(len(tokens), _PATIENCE) + 1):
            if _UNDECODABLE not in self._decode(last := list(tokens[-count:])):
                return last
        return []

    def _characters(self, token: int) -> str:
        """The whole characters that `token` adds.

        The new tokens are decoded behind those that gave the last whole characters (`context`) and
        what that gives anew is the text. Trailing U+FFFD may be a character still to be completed.
        """
        self._pending.append(token)
        text = self._decode(self._context + self._pending)
        hopeless = len(self._pending) >= _PATIENCE
        certain = text if hopeless else text.rstrip(_UNDECODABLE)
        new = certain[self._shown :]
        if hopeless or (new and certain == text):
            self._context, self._pending = self._pending, []
            self._shown = len(self._decode(self._context))
        else:
            self._shown += len(new)
        return new

    def _release(self, new: str) -> str:
        """`new` behind what was held, up to a stop string or to where one may be beginning."""
        text = self.held + new
        found = [(at + len(stop), at) for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:  # the one that is complete first
            self.stopped = True
            self.held = ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
