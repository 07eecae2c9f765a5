import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from retentive.data import tokenizer as module
from retentive.data.tokenizer import (
    TextTokenizer,
    byte_tokenizer,
    copy_tokenizer,
    cut,
    encode,
    end_id,
    load_tokenizer,
    save_tokenizer,
    token_bytes,
    train_tokenizer,
    vocab_size,
)
from retentive.errors import InputError

BYTES = byte_tokenizer()
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def words(*vocabulary: str) -> Tokenizer:
    ids = {word: i for i, word in enumerate(vocabulary)}
    return Tokenizer(models.WordLevel(ids, unk_token=vocabulary[0]))


@given(TEXT)
def test_bytes_are_one_token_each_and_decode_to_themselves(text: str):
    ids = BYTES.encode(text).ids
    assert len(ids) == len(text.encode())
    assert BYTES.decode(ids) == text


@given(text=TEXT)
def test_bpe_writes_every_text(bpe: Tokenizer, text: str):
    ids = bpe.encode(text, add_special_tokens=False).ids
    assert bpe.decode(ids, skip_special_tokens=False) == text
    assert token_bytes(bpe)[ids].sum() == len(text.encode())


def test_vocabularies(python_text: str):
    assert BYTES.get_vocab_size() == 257
    assert end_id(BYTES) == 0
    assert train_tokenizer([python_text], 300).get_vocab_size() == 300
    assert train_tokenizer(["ab ab"], 300).get_vocab_size() == 259  # ab, and a space before it
    with pytest.raises(InputError, match="vocab_size is 256; it is at least 257"):
        train_tokenizer(["text"], 256)


def test_training_is_the_same_every_time(python_text: str):
    assert (
        train_tokenizer([python_text], 400).to_str() == train_tokenizer([python_text], 400).to_str()
    )


def test_bpe_learns_from_an_even_sample(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_SAMPLE", 300)
    sample = module._sample(str(i) for i in range(1000))
    assert 297 < sum(map(len, sample)) <= 300  # characters
    assert 400 < np.mean([int(text) for text in sample]) < 600
    assert sample == module._sample(str(i) for i in range(1000))


class TestCut:
    @given(st.text("a \n"), st.integers(1, 8))
    def test_nothing_is_lost(self, text: str, length: int):
        pieces = list(cut(text, length))
        assert "".join(piece for piece, _ in pieces) == text
        assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]
        assert all(len(piece) <= 2 * length for piece, _ in pieces)

    def test_paragraphs_are_cut_between(self, bpe: Tokenizer):
        text = "value return\nself\n\n\ndef x\n\n" * 100
        for prose in (text, text.replace("\nself", " self")):
            pieces = [piece for piece, _ in cut(prose, 50)]
            assert all(piece.endswith("\n") for piece in pieces)
            ids = [i for piece in pieces for i in bpe.encode(piece).ids]
            assert ids == bpe.encode(prose).ids

    @pytest.mark.parametrize("length", [500, 3000])
    def test_pieces_tokenize_like_the_whole(self, bpe: Tokenizer, python_text: str, length: int):
        pieces = [piece for piece, _ in cut(python_text, length)]
        assert len(pieces) > 10
        ids = [i for piece in pieces for i in bpe.encode(piece).ids]
        assert ids == bpe.encode(python_text).ids


@pytest.mark.parametrize("at_once", [10, 1000, 2**19])
def test_texts_stream_through_and_come_out_one_by_one(
    bpe: Tokenizer, python_text: str, monkeypatch: pytest.MonkeyPatch, at_once: int
):
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    texts = ["", "x", python_text[:5000], "état\n" * 50, "", " "]
    encoded = list(encode(bpe, texts))
    assert [bpe.decode(ids.tolist()) for ids in encoded] == texts
    assert all(ids.dtype == np.int64 for ids in encoded)


class TestFiles:
    def test_a_folder_or_a_file(self, bpe: Tokenizer, tmp_path: Path):
        save_tokenizer(bpe, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
        assert load_tokenizer(tmp_path).to_str() == bpe.to_str()
        assert load_tokenizer(tmp_path / "tokenizer.json").to_str() == bpe.to_str()

    def test_special_tokens_in_a_text_are_text(self, tmp_path: Path):
        save_tokenizer(BYTES, tmp_path)
        for tokenizer in (BYTES, load_tokenizer(tmp_path)):
            assert end_id(tokenizer) not in tokenizer.encode("a<|end|>").ids

    def test_texts_are_taken_whole(self, bpe: Tokenizer, tmp_path: Path):
        other = Tokenizer.from_str(bpe.to_str())
        other.enable_truncation(2)
        other.enable_padding(length=50)
        save_tokenizer(other, tmp_path)
        assert (
            load_tokenizer(tmp_path).encode("def self état").ids == bpe.encode("def self état").ids
        )

    def test_a_missing_one(self, tmp_path: Path):
        with pytest.raises(InputError, match=r"no tokenizer at .*tokenizer\.json: give"):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize("content", ["", "{", '{"model": {}}', json.dumps([1])])
    def test_a_file_that_is_none(self, tmp_path: Path, content: str):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(InputError, match=r"tokenizer\.json is no tokenizer\.json: "):
            load_tokenizer(tmp_path)

    def test_settings_go_along(self, tmp_path: Path):
        (tmp_path / "new").mkdir()
        assert copy_tokenizer(tmp_path, tmp_path / "new") is False
        save_tokenizer(BYTES, tmp_path)
        for name in ("tokenizer_config.json", "chat_template.jinja"):
            (tmp_path / name).write_text("{}")
        assert copy_tokenizer(tmp_path, tmp_path / "new") is True
        names = {path.name for path in (tmp_path / "new").iterdir()}
        assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}

    @pytest.mark.parametrize("content", ['{"bos', "[1]"])
    def test_settings_that_are_none(self, tmp_path: Path, content: str):
        save_tokenizer(BYTES, tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(InputError, match=r"tokenizer_config\.json (is no JSON|holds no sett)"):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize("token", ["<|im_end|>", {"content": "<|im_end|>"}])
    @pytest.mark.parametrize("others", [(), ("<|endoftext|>",)])
    def test_the_end_that_settings_name(self, tmp_path: Path, token: object, others: tuple):
        save_tokenizer(words("a", *others, "<|im_end|>"), tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
        tokenizer = load_tokenizer(tmp_path)
        assert TextTokenizer(tokenizer).end == tokenizer.token_to_id("<|im_end|>")


class TestEndToken:
    @pytest.mark.parametrize("name", ["<|end|>", "<|endoftext|>", "</s>"])
    def test_other_peoples_names(self, name: str):
        assert end_id(words("a", "b", name)) == 2

    def test_none(self):
        with pytest.raises(InputError, match=r"no end token: it needs one of <\|end\|>, "):
            end_id(words("a"))


def test_ids_with_gaps_count_up_to_the_highest():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 6, "</s>": 2}, unk_token="a"))
    assert vocab_size(tokenizer) == len(token_bytes(tokenizer)) == 7


class TestTokenBytes:
    def test_byte_fallback_and_spaces_drawn_as_lines(self):
        tokenizer = words("▁one", "▁", "é", "<0x0A>", "</s>")
        tokenizer.add_special_tokens(["</s>"])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])  # pyright: ignore
        assert token_bytes(tokenizer).tolist() == [4, 1, 2, 1, 0]

    def test_added_words_count_and_special_tokens_do_not(self, bpe: Tokenizer):
        tokenizer = Tokenizer.from_str(bpe.to_str())
        tokenizer.add_tokens(["état"])
        counts = token_bytes(tokenizer)
        assert counts[end_id(tokenizer)] == 0
        assert counts[-1] == 5
        assert len(counts) == tokenizer.get_vocab_size()
