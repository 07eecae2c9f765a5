"""Documents from files: "stdlib", text (also .gz, .xz), folders, globs, JSON lines.

A file is a document; in .txt files form feeds separate documents, in .jsonl files each line is one.
Everything streams: memory holds one document, and one longer than `LONGEST` is cut at a line end.
"""

import glob
import gzip
import hashlib
import json
import logging
import lzma
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

from retentive.errors import InputError, nearest

LONGEST = 2**24  # bytes of a document
_STDLIB_LEAST = 5_000_000  # bytes; some distributions ship the standard library in parts
# Tests, other people's packages, and tables that are not code.
_STDLIB_LEFT_OUT = frozenset(
    "test tests idle_test site-packages dist-packages pydoc_data encodings".split()
)
_OPENERS: dict[str, Callable[[Path, str], IO[bytes]]] = {".gz": gzip.open, ".xz": lzma.open}  # pyright: ignore
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    name: str
    text: str


def read_documents(
    sources: Sequence[str], *, text_field: str = "text", skip_undecodable: bool = False
) -> Iterator[Document]:
    """The documents of `sources`, in the order of `find_files`; empty ones are left out.

    `text_field` is the field of a JSON line that holds the text. What is not UTF-8 text raises
    InputError, or is left out and logged with `skip_undecodable`.
    """
    for path in find_files(sources):
        for name, raw in _raw_documents(path):
            try:
                text = _field(name, raw, text_field) if _kind(path) == ".jsonl" else _decode(raw)
            except UnicodeError as error:
                if not skip_undecodable:
                    raise InputError(
                        f"{name} is not UTF-8 text ({error}): convert it, or leave such documents "
                        "out with --data.skip-undecodable"
                    ) from None
                _tell_left_out(name)
                continue
            if text and not text.isspace():
                yield Document(name, text)


def find_files(sources: Sequence[str]) -> list[Path]:
    """The files behind `sources`, each once: in the order given, folders and globs sorted."""
    if not sources:
        raise InputError('no corpus: give files, folders, globs or "stdlib" as sources')
    return list(dict.fromkeys(path for source in sources for path in _files(source)))


def fingerprint(sources: Sequence[str]) -> str:
    """A hash of the files' bytes and kinds, whatever the folder they lie in."""
    digest = hashlib.blake2b(digest_size=16)
    for path in find_files(sources):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        digest.update(content.digest() + f"{_kind(path)} {path.suffix}\n".encode())
    return digest.hexdigest()


@cache  # once, however often a corpus is read
def _tell_left_out(name: str) -> None:
    _log.warning("left out %s: not UTF-8 text", name)


def _files(source: str) -> list[Path]:
    if source == "stdlib":
        return _stdlib_files(Path(sysconfig.get_path("stdlib")))
    path = Path(os.path.expanduser(source))  # where Path's own raises for an unknown user
    if path.is_file():
        return [path]
    if path.is_dir():
        found = _visible_files(path)
        if not found:
            raise InputError(f"the folder {source} holds no files")
        return found
    if glob.has_magic(source):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        found = [path for path in found if path.is_file()]
        if not found:
            raise InputError(f"no file matches {source}")
        return found
    if path.exists():
        raise InputError(f"{source} is no regular file; a corpus is read more than once")
    beside = os.listdir(path.parent) if path.parent.is_dir() else []
    near = nearest(path.name, beside)
    raise InputError(f'{source} does not exist{near}; give a file, a folder, a glob or "stdlib"')


def _visible_files(folder: Path, left_out: frozenset[str] = frozenset()) -> list[Path]:
    """The files below `folder`, sorted, but for hidden files and folders and folders `left_out`."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "." and name not in left_out]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())  # a pipe would be waited for


def _stdlib_files(root: Path) -> list[Path]:
    """The standard library's own sources, without tests and tables."""
    found = [
        path
        for path in _visible_files(root, _STDLIB_LEFT_OUT)
        if path.suffix == ".py"
        and not path.name.startswith("_sysconfigdata")  # the build's paths and flags
    ]
    size = sum(path.stat().st_size for path in found)
    if size < _STDLIB_LEAST:
        raise InputError(
            f"the standard library in {root} has {size / 1e6:.1f} MB of sources, too little to "
            "learn from: install all of it (Debian, Ubuntu: apt install python3-full), or give "
            "other sources"
        )
    return found


def _kind(path: Path) -> str:
    """ ".txt" for a.txt and for a.txt.xz."""
    return Path(path.stem).suffix if path.suffix in _OPENERS else path.suffix


def _raw_documents(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each document; for JSON lines, of each line."""
    try:
        with _open(path) as file:
            if _kind(path) == ".jsonl":
                yield from ((f"{path}:{i}", line) for i, line in enumerate(file, 1) if line.strip())
            else:
                parts = _parts(file, separated=_kind(path) == ".txt")
                yield from ((f"{path}#{i}" if i else str(path), raw) for i, raw in enumerate(parts))
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{path} is damaged, or not a {path.suffix} file: {error}") from None


def _open(path: Path) -> IO[bytes]:
    return _OPENERS.get(path.suffix, open)(path, "rb")


def _parts(file: IO[bytes], separated: bool) -> Iterator[bytes]:
    """`file` cut at form feeds if they separate documents, and where a part gets too long."""
    rest = b""
    while chunk := file.read(2**20):
        *whole, rest = (rest + chunk).split(b"\f") if separated else [rest + chunk]
        yield from whole
        while len(rest) > LONGEST:
            cut = _line_end(rest)
            yield rest[:cut]
            rest = rest[cut:]
    yield rest


def _line_end(text: bytes) -> int:
    """The last line end within `LONGEST`, or else the last whole character."""
    if cut := text.rfind(b"\n", 0, LONGEST) + 1:
        return cut
    begins = (i for i in range(LONGEST, LONGEST - 4, -1) if text[i] & 0xC0 != 0x80)
    return next(begins, LONGEST)


def _decode(raw: bytes) -> str:
    if b"\0" in raw:
        raise UnicodeError("it is binary")
    return raw.decode("utf-8-sig")


def _field(name: str, line: bytes, field: str) -> str:
    """The text in the JSON object of a line."""
    try:
        record = json.loads(_decode(line))
    except json.JSONDecodeError as error:
        raise InputError(f"{name} is not a line of JSON: {error.msg}") from None
    if not isinstance(record, dict):
        raise InputError(f"{name} is no JSON object: a line is one, with the text in {field!r}")
    if field not in record:
        near = nearest(field, record)
        raise InputError(
            f"{name} has no field {field!r}{near}, only {', '.join(record)}: "
            "name the one that holds the text with --data.text-field"
        )
    text = record[field]
    if not isinstance(text, str):
        raise InputError(f"{name}: the field {field!r} holds {type(text).__name__}, not text")
    text.encode()  # JSON can spell half a surrogate pair, which is no text
    return text
