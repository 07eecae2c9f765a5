"""How texts begin: with what token, and does the tokenizer put it there?"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from retentive.data.tokenizer import END, end_id, load_tokenizer, vocab_size

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TextTokenizer:
    """A `tokenizers.Tokenizer` that begins texts as its model was trained, and transformers does.

    That is what a folder's tokenizer_config.json says of bos_token and add_bos_token. Where there
    is none, texts begin with the end token, which is put before every text if the tokenizer is
    ours; of another's the tokenizer.json says what goes before.
    """

    def __init__(self, tokenizer: "Tokenizer", folder: Path | None = None):
        self.tokenizer, self.end = tokenizer, end_id(tokenizer)
        config = _config(folder)
        token = config.get("bos_token")
        name = token["content"] if isinstance(token, dict) else token
        begin = None if name is None else tokenizer.token_to_id(name)
        self.begin = self.end if begin is None else begin
        self._begins = config.get("add_bos_token", tokenizer.token_to_id(END) == self.begin)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        return cls(load_tokenizer(folder), Path(folder))

    @property
    def vocab_size(self) -> int:
        return vocab_size(self.tokenizer)

    def encode(self, text: str, *, begin: bool) -> list[int]:
        """`begin`: with what goes before a text."""
        ids = self.tokenizer.encode(text, add_special_tokens=begin).ids
        if begin and self._begins and ids[:1] != [self.begin]:
            return [self.begin, *ids]
        return ids


def _config(folder: Path | None) -> dict[str, Any]:
    path = None if folder is None else folder / "tokenizer_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}
