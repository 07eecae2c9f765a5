"""Tokenizers: byte-level BPE trained here, bytes, or anybody's tokenizer.json.

All are `tokenizers.Tokenizer`. Ours have the end token as id 0, then the 256 bytes, then merges;
every text can be written in them and decodes to itself.
"""

import heapq
import json
import os
import random
import re
import shutil
from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retentive.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END = "<|end|>"
FILE = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
_BESIDE = (
    SETTINGS,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
_END_NAMES = (END, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_SMALLEST = 257  # the end token and the bytes
_SAMPLE = 2**25  # characters that BPE is trained on at most, in pieces of about `_PIECE`
_PIECE = 2**14
_AT_ONCE = 2**19  # characters encoded at once: the library holds up to 450 bytes for each


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """Byte-level BPE with at most `vocab_size` entries (fewer if `texts` has too little to merge).

    Trained on an even random sample of at most 2**25 characters, so that memory stays below
    a few hundred MB whatever the corpus.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < _SMALLEST:
        raise InputError(
            f"vocab_size is {vocab_size}; it is at least {_SMALLEST} (bytes and an end)"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,  # pyright: ignore
        special_tokens=[END],  # pyright: ignore
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # pyright: ignore
        show_progress=False,  # pyright: ignore
    )
    tokenizer.train_from_iterator(_sample(texts), trainer)
    tokenizer.encode_special_tokens = True  # text that spells the end token out does not end
    return tokenizer


def byte_tokenizer() -> "Tokenizer":
    """A token a byte, and the end token."""
    return train_tokenizer((), _SMALLEST)


def load_tokenizer(path: str | os.PathLike[str]) -> "Tokenizer":
    """The tokenizer of a model folder, or of a tokenizer.json, whole texts and no padding.

    Text that spells a special token out is text, as in training. What the tokenizer_config.json
    beside it says goes along, for `TextTokenizer`.
    """
    from tokenizers import Tokenizer

    file = Path(os.path.expanduser(path))
    if file.is_dir():
        file /= FILE
    if not file.is_file():
        raise InputError(f"there is no tokenizer at {file}: give a tokenizer.json or its folder")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more specific
        raise InputError(f"{file} is no tokenizer.json: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    vars(tokenizer)["settings"] = _read_settings(file.with_name(SETTINGS))
    return tokenizer


def _read_settings(file: Path) -> dict[str, Any] | None:
    """None where there is no such file."""
    if not file.is_file():
        return None
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, no UTF-8
        raise InputError(f"{file} is no JSON: {error}; repair or delete it") from None
    if not isinstance(settings, dict):
        raise InputError(f"{file} holds no settings: give an object, or delete it")
    return settings


def save_tokenizer(tokenizer: "Tokenizer", folder: str | os.PathLike[str]) -> None:
    """Writes `folder`/tokenizer.json, aside first, so that a reader never sees half of it."""
    file = Path(folder, FILE)
    aside = file.with_name(f".{FILE}.{os.getpid()}")
    aside.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    aside.replace(file)


def copy_tokenizer(source: Path, folder: Path) -> bool:
    """Copies a model folder's tokenizer with all that says how it is used. False: there is none."""
    if not (source / FILE).is_file():
        return False
    for name in (FILE, *_BESIDE):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    return True


def end_id(tokenizer: "Tokenizer") -> int:
    """The id of the token that ends a text: ours, or what other tokenizers call it."""
    ids = (tokenizer.token_to_id(name) for name in _END_NAMES)
    found = next((i for i in ids if i is not None), None)
    if found is None:
        raise InputError(f"the tokenizer has no end token: it needs one of {', '.join(_END_NAMES)}")
    return found


def vocab_size(tokenizer: "Tokenizer") -> int:
    """How many ids there are, 0 to the highest: more than entries where the ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


class TextTokenizer:
    """How the texts of a model begin and end, by its tokenizer and the settings loaded with it.

    As in transformers, what the template in tokenizer.json puts before a text is there, whatever
    add_bos_token in tokenizer_config.json says: transformers asks that only for tokenizers that
    have no tokenizer.json. In ours, whose settings name no other end, texts begin with the end
    token, or as bos_token and add_bos_token say: so `RetentiveTokenizer` asks transformers to.
    """

    def __init__(self, tokenizer: "Tokenizer", limit: int | None = None):
        """`limit` is the model's vocab_size: the tokenizer may have more ids, its texts may not.

        InputError where it has no end token, or texts begin with one that the model lacks.
        """
        self.tokenizer = tokenizer
        self.settings: dict[str, Any] | None = vars(tokenizer).get("settings")
        named = self._named("eos_token")
        self.end = end_id(tokenizer) if named is None else named
        self._ours = named is None and self.end == tokenizer.token_to_id(END)
        bos = self._named("bos_token")
        self._begins = (self.settings or {}).get("add_bos_token", True)
        self.begin = self.end if bos is None else bos
        """What a text is predicted from where nothing is before it."""
        ids = vocab_size(tokenizer)
        self.vocab_size = ids if limit is None else min(ids, limit)
        self.check([self.begin, *self.before])

    def encode(self, text: str, *, begin: bool) -> list[int]:
        """`begin`: with what goes before a text. InputError for tokens that the model lacks."""
        by_template = begin and not self._ours
        ids = self.tokenizer.encode(text, add_special_tokens=by_template).ids
        self.check(ids)
        return [*self.before, *ids] if begin and self._ours else ids

    @property
    def before(self) -> list[int]:
        """What the model reads before a new text.

        Without a tokenizer_config.json it is taken to be trained here: behind an end token.
        """
        if self._ours:
            return [self.begin] if self._begins else []
        if self.settings is None:
            return [self.end]
        found = self.tokenizer.encode("a")
        pairs = zip(found.ids, found.special_tokens_mask, strict=True)
        return [token for token, _ in takewhile(lambda pair: pair[1], pairs)]

    def check(self, ids: Iterable[int]) -> None:
        """InputError where one of them is beyond the model's vocabulary."""
        highest = max(ids, default=0)
        if highest >= self.vocab_size:
            raise InputError(
                f"a text holds {self.tokenizer.id_to_token(highest)!r}, token {highest} of the"
                f" tokenizer, and the model has {self.vocab_size}; give the tokenizer.json that it"
                " was trained with, or other texts"
            )

    def describe(self) -> str:
        """All that decides which tokens a text is."""
        return json.dumps([self.tokenizer.to_str(), self.before, self.begin, self.end])

    def _named(self, name: str) -> int | None:
        """The id of a token of the settings, which give its text or a description of it."""
        token = (self.settings or {}).get(name)
        text = token.get("content") if isinstance(token, dict) else token
        return self.tokenizer.token_to_id(text) if isinstance(text, str) else None


def token_bytes(tokenizer: "Tokenizer") -> np.ndarray:
    """int64 [vocab]: the UTF-8 bytes of text that each token stands for, 0 for special tokens.

    Exact for byte-level BPE and for byte fallback; for normalising tokenizers (lower case, say) the
    bytes of what they kept.
    """
    added = tokenizer.get_added_tokens_decoder()
    decoder: Any = tokenizer.decoder
    byte_level = decoder is not None and b"ByteLevel" in decoder.__getstate__()
    counts = np.zeros(vocab_size(tokenizer), np.int64)
    for token, i in tokenizer.get_vocab().items():
        if i in added:
            counts[i] = 0 if added[i].special else len(token.encode())
        elif byte_level:
            counts[i] = len(token)  # a character stands for a byte
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):
            counts[i] = 1
        else:
            counts[i] = len(token.replace("▁", " ").removeprefix("##").encode())
    return counts


def encode(tokenizer: "Tokenizer", texts: Iterable[str]) -> Iterator[np.ndarray]:
    """The ids of each text, without special tokens, int64; texts stream through on all cores."""
    pieces = ((piece, last) for text in texts for piece, last in cut(text, _AT_ONCE // 2))
    parts: list[np.ndarray] = []
    for group in _groups(pieces):
        encodings = tokenizer.encode_batch_fast([p for p, _ in group], add_special_tokens=False)
        for (_, last), encoding in zip(group, encodings, strict=True):
            parts.append(np.asarray(encoding.ids, np.int64))
            if last:
                yield np.concatenate(parts)
                parts = []


def _groups(pieces: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """`pieces` in lists of about `_AT_ONCE` characters together."""
    group: list[tuple[str, bool]] = []
    length = 0
    for piece in pieces:
        group.append(piece)
        length += len(piece[0])
        if length >= _AT_ONCE:
            yield group
            group, length = [], 0
    if group:
        yield group


# Where byte-level BPE never merges over the cut: it takes the last of several line ends for itself.
_BETWEEN_LINES = re.compile(r"\S\n(?=\S)|\n(?=\n\S)")


def cut(text: str, length: int) -> Iterator[tuple[str, bool]]:
    """`text` in pieces of about `length` characters that tokenize like the whole; is it the last?

    Cut after a line end between two lines that are not indented or empty, or before the line end of
    an empty line above an unindented one; where none comes within another `length`, anywhere.
    """
    start = 0
    while len(text) - start > 2 * length:
        between = _BETWEEN_LINES.search(text, start + length, start + 2 * length)
        stop = between.end() if between else start + 2 * length
        yield text[start:stop], False
        start = stop
    yield text[start:], True


def _sample(texts: Iterable[str]) -> list[str]:
    """A uniform sample of the pieces of `texts`, the same every time: those of the highest dice."""
    dice = random.Random(0)
    kept: list[tuple[float, str]] = []
    length = 0
    for piece in (piece for text in texts for piece, _ in cut(text, _PIECE)):
        heapq.heappush(kept, (dice.random(), piece))
        length += len(piece)
        while length > _SAMPLE:
            length -= len(heapq.heappop(kept)[1])
    return [piece for _, piece in kept]
