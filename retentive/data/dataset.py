"""A corpus as token shards: `prepare` reads, splits and tokenizes it once, then maps it from disk.

A split is one stream of tokens: every document is the end token followed by its text. The target of
a token is the one after it: a document's last token has the next document's end token as target.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retentive.data.corpus import Document, fingerprint, read_documents
from retentive.data.tokenizer import (
    END,
    byte_tokenizer,
    encode,
    end_id,
    load_tokenizer,
    save_tokenizer,
    token_bytes,
    train_tokenizer,
    vocab_size,
)
from retentive.errors import InputError
from retentive.io.cache import cache_root, made_once

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_FORMAT = 2  # of the cache; counts up when the same corpus would give other files
_TOLD = 10_000_000  # bytes of text between two lines of progress

Progress = Callable[[str], None]


@dataclass(frozen=True)
class DataConfig:
    """What to train on and how it is cut into tokens."""

    sources: tuple[str, ...] = ("stdlib",)
    """Files (.txt, .jsonl, any text; also .gz, .xz), folders, globs, or stdlib: Python's own."""
    valid_sources: tuple[str, ...] = ()
    """Held-out documents; without them a fraction of the documents of `sources` is held out."""
    valid_fraction: float = 0.05
    """How much to hold out, by the content of each document. 0: nothing."""
    text_field: str = "text"
    """The field of a JSON line that holds the text."""
    skip_undecodable: bool = False
    """Leave out what is binary or not UTF-8."""
    tokenizer: str = "bpe"
    """bpe (trained on the corpus), bytes, or the path of a tokenizer.json."""
    vocab_size: int = 8192
    """Entries of a trained tokenizer, at most."""
    cache: str | None = None
    """Where token shards are kept; by default in the user's cache folder."""

    def __post_init__(self) -> None:
        if not 0 <= self.valid_fraction < 1:
            raise InputError(f"valid_fraction is {self.valid_fraction}; it is at least 0, below 1")

    def documents(self, sources: tuple[str, ...]) -> Iterator[Document]:
        return read_documents(
            sources, text_field=self.text_field, skip_undecodable=self.skip_undecodable
        )

    def train_documents(self) -> Iterator[Document]:
        documents = self.documents(self.sources)
        return documents if self.valid_sources else (d for d in documents if not self._held_out(d))

    def valid_documents(self) -> Iterator[Document]:
        if self.valid_sources:
            return self.documents(self.valid_sources)
        return (d for d in self.documents(self.sources) if self._held_out(d))

    def _held_out(self, document: Document) -> bool:
        """By content: wherever a document lies, and however often, it is on one side."""
        digest = hashlib.blake2b(document.text.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self.valid_fraction * 2**64


@dataclass(frozen=True)
class Split:
    """Documents as one stream of tokens, mapped from disk."""

    tokens: np.ndarray
    """uint16 or uint32 [num_tokens]"""
    offsets: np.ndarray
    """int64 [num_documents + 1]: document i is tokens[offsets[i] : offsets[i + 1]]"""
    num_bytes: int
    """UTF-8 bytes of the documents' text"""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True)
class Corpus:
    tokenizer: "Tokenizer"
    train: Split
    valid: Split
    hash: str
    """Of contents, split and tokenizer: two runs with the same hash see the same tokens."""
    config: DataConfig

    @property
    def vocab_size(self) -> int:
        return vocab_size(self.tokenizer)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int64 [vocab_size]: the bytes of text of each token, for bits per byte."""
        return token_bytes(self.tokenizer)

    def valid_documents(self) -> Iterator[Document]:
        """The held-out documents themselves, read again from their files."""
        return self.config.valid_documents()


def prepare(config: DataConfig, progress: Progress | None = None) -> Corpus:
    """The corpus of `config` as memory-mapped tokens, from the cache where its content is known.

    `progress` is told what is being done, in a line, now and then. Raises InputError for a corpus
    that is missing, empty, binary, or too small to hold anything out.
    """
    tell = progress or (lambda line: None)
    tell("reading the corpus")
    key = _key(config)
    folder = cache_root(config.cache) / "tokens" / key
    made_once(folder, lambda aside: _build(config, aside, tell))
    tokenizer = load_tokenizer(folder)
    facts = _read_facts(folder)
    dtype = _dtype(tokenizer)
    train = _open_split(folder, "train", facts["train"], dtype)
    valid = _open_split(folder, "valid", facts["valid"], dtype)
    return Corpus(tokenizer, train, valid, key, config)


def _key(config: DataConfig) -> str:
    """A hash of all that the shards depend on."""
    facts = asdict(config) | {
        "format": _FORMAT,
        "cache": None,
        "sources": fingerprint(config.sources),
        "valid_sources": config.valid_sources and fingerprint(config.valid_sources),
    }
    if config.tokenizer not in ("bpe", "bytes"):
        facts["tokenizer"] = load_tokenizer(config.tokenizer).to_str()
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def _build(config: DataConfig, folder: Path, tell: Progress) -> None:
    tokenizer = _make_tokenizer(config, tell)
    save_tokenizer(tokenizer, folder)
    train = _write_split(folder, "train", config.train_documents(), tokenizer, tell)
    valid = _write_split(folder, "valid", config.valid_documents(), tokenizer, tell)
    _refuse_empty(config, train["documents"], valid["documents"])
    (folder / "facts.json").write_text(json.dumps({"train": train, "valid": valid}))


def _refuse_empty(config: DataConfig, train: int, valid: int) -> None:
    """InputError where a side that should have documents has none."""
    if not train + valid:
        raise InputError(f"there is no text in {', '.join(config.sources)}")
    if train and (valid or (not config.valid_sources and config.valid_fraction == 0)):
        return
    side = "hold out" if train else "train on"
    raise InputError(
        f"of the corpus's documents ({train + valid}) none is left to {side}: give more (form "
        "feeds separate documents in a .txt), or what to hold out with --data.valid-sources, or "
        "--data.valid-fraction 0"
    )


def _make_tokenizer(config: DataConfig, tell: Progress) -> "Tokenizer":
    if config.tokenizer == "bpe":
        tell(f"training a tokenizer of {config.vocab_size} entries")
        tokenizer = train_tokenizer((d.text for d in config.train_documents()), config.vocab_size)
    elif config.tokenizer == "bytes":
        tokenizer = byte_tokenizer()
    else:
        tokenizer = load_tokenizer(config.tokenizer)
        try:
            end_id(tokenizer)
        except InputError:
            tokenizer.add_special_tokens([END])
    return tokenizer


def _write_split(
    folder: Path, name: str, documents: Iterator[Document], tokenizer: "Tokenizer", tell: Progress
) -> dict[str, int]:
    """Streams the documents' tokens into `name`.tokens, where they begin into `name`.offsets."""
    end, dtype = end_id(tokenizer), _dtype(tokenizer)
    facts = {"documents": 0, "tokens": 0, "bytes": 0}

    def texts() -> Iterator[str]:
        for document in documents:
            before = facts["bytes"]
            facts["documents"] += 1
            facts["bytes"] += len(document.text.encode())
            if before // _TOLD != facts["bytes"] // _TOLD:
                tell(f"writing {name} tokens: {facts['bytes'] / 1e6:.0f} MB of text")
            yield document.text

    with (
        open(folder / f"{name}.tokens", "wb") as tokens,
        open(folder / f"{name}.offsets", "wb") as offsets,
    ):
        for ids in encode(tokenizer, texts()):
            offsets.write(np.int64(facts["tokens"]).tobytes())
            tokens.write(np.concatenate([[end], ids]).astype(dtype).tobytes())
            facts["tokens"] += 1 + len(ids)
        offsets.write(np.int64(facts["tokens"]).tobytes())
    return facts


def _dtype(tokenizer: "Tokenizer") -> type[np.unsignedinteger]:
    return np.uint16 if vocab_size(tokenizer) <= 2**16 else np.uint32


def _read_facts(folder: Path) -> dict[str, dict[str, int]]:
    try:
        return json.loads((folder / "facts.json").read_text())
    except ValueError:
        raise _damaged(folder) from None


def _damaged(folder: Path) -> InputError:
    return InputError(f"{folder} is damaged: delete this folder, it is only a cache")


def _open_split(
    folder: Path, name: str, facts: dict[str, int], dtype: type[np.unsignedinteger]
) -> Split:
    tokens = _map(folder / f"{name}.tokens", dtype, facts["tokens"])
    offsets = _map(folder / f"{name}.offsets", np.int64, facts["documents"] + 1)
    return Split(tokens, offsets, facts["bytes"])


def _map(path: Path, dtype: type[np.integer], length: int) -> np.ndarray:
    if path.stat().st_size != length * np.dtype(dtype).itemsize:
        raise _damaged(path.parent)
    if not length:  # nothing cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")
