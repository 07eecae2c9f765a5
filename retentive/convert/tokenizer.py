"""The tokenizer that comes with a checkpoint, as the tokenizer.json that this package reads."""

import json
import shutil
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from retentive.convert.source import read_json
from retentive.data.tokenizer import FILE, load_tokenizer, vocab_size
from retentive.errors import InputError
from retentive.io.atomic import write_text

CONFIG = "tokenizer_config.json"
SETTINGS = (CONFIG, "special_tokens_map.json", "added_tokens.json")
BESIDE = ("chat_template.jinja", "generation_config.json")
OTHERS = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")
"""Of tokenizers that are not yet a tokenizer.json."""
PROBES = ("Two lines,\nof  words: 3.14 €", "def f(x):\n    return x", "Größe, мир, 日本語")


def bring_tokenizer(source: Path, out: Path, ids: int) -> list[str]:
    """Put the tokenizer of folder `source` into `out`; what there is to say about it, in lines.

    ids: how many the model has. Nothing of a checkpoint is run, and a tokenizer that cannot be had
    is no reason not to have the weights.
    """
    files = _copy((FILE, *SETTINGS, *BESIDE, *OTHERS), source, out)
    lines = _leave_code_out(source, out) if CONFIG in files else []
    if FILE not in files:
        if not set(files) & set(OTHERS):
            return [*lines, f"{source} holds no tokenizer: none was written"]
        if reason := _make_fast(out):
            kind = ", ".join(name for name in files if name in OTHERS)
            return [*lines, f"its tokenizer ({kind}) did not become a {FILE}: {reason}"]
    try:
        entries = vocab_size(load_tokenizer(out))
    except InputError as error:  # `out` is about to have another name; the fault is the source's
        return [*lines, str(error).replace(str(out), str(source))]
    if entries > ids:
        lines.append(
            f"its tokenizer has {entries} ids and the model {ids}: some texts will be refused"
        )
    return lines


def _copy(names: Iterable[str], source: Path, out: Path) -> list[str]:
    """Those of the files that are there."""
    there = [name for name in names if (source / name).is_file()]
    for name in there:
        shutil.copyfile(source / name, out / name)
    return there


def _leave_code_out(source: Path, out: Path) -> list[str]:
    """Settings without the names of code to run (auto_map); without settings where they are broken.

    Of the latter a line says so.
    """
    try:
        settings = read_json(source / CONFIG)
    except InputError as error:
        (out / CONFIG).unlink()
        return [f"{error} (it was left out)"]
    settings.pop("auto_map", None)
    write_text(out / CONFIG, json.dumps(settings, indent=2) + "\n")
    return []


def _make_fast(out: Path) -> str | None:
    """Write the tokenizer.json of the tokenizer in `out`; the reason where that fails."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return 'that takes transformers: pip install "retentive[hf]"'
    model = next(out.glob("*.model"), None)
    if model is not None and find_spec("sentencepiece") is None:
        return "that takes sentencepiece: pip install sentencepiece"
    with TemporaryDirectory() as alone:  # without the model's config, which may name code
        _copy((*SETTINGS, *OTHERS), out, Path(alone))
        try:
            AutoTokenizer.from_pretrained(alone).backend_tokenizer.save(str(out / FILE))
        except Exception as error:  # of transformers, tokenizers, sentencepiece, protobuf, ...
            return (str(error).strip() or type(error).__name__).splitlines()[0]
    if model is not None and not _agree(out, model):
        (out / FILE).unlink()
        return (
            "the one that transformers makes reads texts otherwise; it may take a"
            ' tokenizer_config.json with its class, such as {"tokenizer_class": "LlamaTokenizer"}'
        )
    return None


def _agree(folder: Path, model: Path) -> bool:
    """Does the tokenizer.json in `folder` read texts as the SentencePiece model does?"""
    pieces = import_module("sentencepiece").SentencePieceProcessor(model_file=str(model))
    made = load_tokenizer(folder)
    return all(pieces.encode(x) == made.encode(x, add_special_tokens=False).ids for x in PROBES)
