import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from retentive.data import dataset
from retentive.data.dataset import Corpus, DataConfig, Split, prepare
from retentive.data.tokenizer import END, end_id, save_tokenizer
from retentive.errors import InputError

TEXTS = [f"Document {i} says: " + "état, 🙂 and more. " * (i % 7) for i in range(100)]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Hundred documents in a file, cut into bytes, a cache of their own."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("\f".join(TEXTS))
    return DataConfig(("a.txt",), tokenizer="bytes", valid_fraction=0.2, cache="cache")


def documents(corpus: Corpus, split: Split) -> list[str]:
    """What the stream of a split says, document by document."""
    end = end_id(corpus.tokenizer)
    found = []
    for start, stop in pairwise(split.offsets):
        first, *rest = split.tokens[start:stop].tolist()
        assert first == end and end not in rest
        found.append(corpus.tokenizer.decode(rest, skip_special_tokens=False))
    return found


def test_the_splits_hold_every_document_once(config: DataConfig):
    corpus = prepare(config)
    train, valid = documents(corpus, corpus.train), documents(corpus, corpus.valid)
    assert sorted(train + valid) == sorted(TEXTS)
    assert 8 <= len(valid) <= 32
    assert [document.text for document in corpus.valid_documents()] == valid
    for split, texts in (corpus.train, train), (corpus.valid, valid):
        assert split.num_documents == len(texts)
        assert split.num_bytes == sum(len(text.encode()) for text in texts)
        assert split.num_tokens == split.num_bytes + split.num_documents
        assert corpus.token_bytes[split.tokens].sum() == split.num_bytes
        assert isinstance(split.tokens, np.memmap) and split.tokens.dtype == np.uint16


def test_bpe_is_trained_on_the_training_documents(config: DataConfig):
    corpus = prepare(replace(config, tokenizer="bpe", vocab_size=300))
    assert corpus.vocab_size == 300
    held_out = documents(corpus, corpus.valid)
    assert sorted(documents(corpus, corpus.train) + held_out) == sorted(TEXTS)
    assert corpus.valid.num_tokens < sum(map(len, held_out))


def test_a_document_is_on_one_side_whatever_its_place(config: DataConfig):
    def held_out(*sources: str) -> set[str]:
        return {d.text for d in replace(config, sources=sources).valid_documents()}

    Path("reversed.txt").write_text("\f".join(TEXTS[::-1] + TEXTS))
    Path("lines.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    assert held_out("a.txt") == held_out("reversed.txt") == held_out("lines.jsonl")


def test_valid_sources_are_held_out_instead(config: DataConfig):
    Path("b.txt").write_text("held out")
    corpus = prepare(replace(config, valid_sources=("b.txt",)))
    assert documents(corpus, corpus.train) == TEXTS
    assert documents(corpus, corpus.valid) == ["held out"]
    assert [document.text for document in corpus.valid_documents()] == ["held out"]


def test_nothing_is_held_out_where_nothing_is_asked_for(config: DataConfig):
    corpus = prepare(replace(config, valid_fraction=0))
    assert documents(corpus, corpus.train) == TEXTS
    assert (corpus.valid.num_tokens, corpus.valid.num_documents) == (0, 0)


def test_text_that_spells_the_end_token_does_not_end(config: DataConfig):
    for tokenizer in ("bytes", "bpe"):
        Path("a.txt").write_text(f"before {END} after")
        corpus = prepare(replace(config, tokenizer=tokenizer, valid_fraction=0))
        assert documents(corpus, corpus.train) == [f"before {END} after"]
        assert end_id(corpus.tokenizer) not in corpus.tokenizer.encode(END).ids


class TestCache:
    def test_a_known_corpus_is_not_built_again(
        self, config: DataConfig, monkeypatch: pytest.MonkeyPatch
    ):
        built = prepare(config)
        Path("elsewhere").mkdir()
        Path("a.txt").rename("elsewhere/b.txt")
        monkeypatch.setattr(dataset, "_build", None)
        again = prepare(replace(config, sources=("elsewhere/b.txt",)))
        assert again.hash == built.hash
        assert np.array_equal(again.train.tokens, built.train.tokens)

    @pytest.mark.parametrize(
        "change",
        [{"tokenizer": "bpe"}, {"valid_fraction": 0.3}, {"valid_sources": ("a.txt",)}],
    )
    def test_another_split_or_tokenizer_is_another_corpus(self, config: DataConfig, change: dict):
        assert prepare(config).hash != prepare(replace(config, **change)).hash

    def test_another_content_is_another_corpus(self, config: DataConfig):
        before = prepare(config)
        Path("a.txt").write_text("\f".join([*TEXTS, "one more"]))
        after = prepare(config)
        assert after.hash != before.hash
        assert "one more" in documents(after, after.train) + documents(after, after.valid)

    def test_a_truncated_record_says_what_to_delete(self, config: DataConfig):
        prepare(config)
        (facts,) = Path(config.cache or "").rglob("facts.json")
        facts.write_text('{"train": {"docu')
        with pytest.raises(InputError, match=f"{facts.parent} is damaged: delete this folder"):
            prepare(config)

    def test_a_damaged_cache_says_what_to_delete(self, config: DataConfig):
        prepare(config)
        (tokens,) = Path("cache").rglob("train.tokens")
        tokens.write_bytes(tokens.read_bytes()[:-1])
        with pytest.raises(InputError, match=f"{tokens.parent} is damaged: delete this folder"):
            prepare(config)


class TestGivenTokenizer:
    def words(self, *vocabulary: str) -> None:
        ids = {word: i for i, word in enumerate(vocabulary)}
        tokenizer = Tokenizer(models.WordLevel(ids, unk_token=vocabulary[0]))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
        save_tokenizer(tokenizer, ".")

    def prepare(self, config: DataConfig) -> Corpus:
        return prepare(replace(config, tokenizer="tokenizer.json", valid_fraction=0))

    def test_its_end_token_is_used(self, config: DataConfig):
        self.words("?", "Document", "</s>")
        corpus = self.prepare(config)
        assert corpus.vocab_size == 3
        assert corpus.train.tokens[:4].tolist() == [2, 1, 0, 0]

    def test_it_gets_one_where_it_has_none(self, config: DataConfig):
        self.words("?", "Document")
        corpus = self.prepare(config)
        assert corpus.vocab_size == 3
        assert corpus.tokenizer.token_to_id(END) == 2
        assert corpus.train.tokens[:4].tolist() == [2, 1, 0, 0]

    def test_large_vocabularies_take_four_bytes(self, config: DataConfig):
        self.words("?", *(f"w{i}" for i in range(70_000)), "Document", "</s>")
        corpus = self.prepare(config)
        assert corpus.train.tokens.dtype == np.uint32
        assert corpus.train.tokens[:3].tolist() == [70_002, 70_001, 0]

    def test_its_content_counts_and_not_its_place(self, config: DataConfig):
        self.words("?", "Document")
        before = self.prepare(config).hash
        self.words("?", "says:")
        assert self.prepare(config).hash != before

    def test_a_missing_one(self, config: DataConfig):
        with pytest.raises(InputError, match=r"no tokenizer at tokenizer\.json"):
            self.prepare(config)


class TestBadInput:
    def test_no_text_at_all(self, config: DataConfig):
        Path("a.txt").write_text("\n \f \n")
        with pytest.raises(InputError, match=r"there is no text in a\.txt"):
            prepare(config)
        assert not list(Path("cache/tokens").glob("*.partial"))

    def test_nothing_to_hold_out(self, config: DataConfig):
        Path("a.txt").write_text("a single document")
        with pytest.raises(InputError) as error:
            prepare(replace(config, valid_fraction=0.001))
        assert str(error.value).startswith("of the corpus's documents (1) none is left to hold out")
        assert "--data.valid-sources" in str(error.value)

    def test_nothing_to_train_on(self, config: DataConfig):
        Path("a.txt").write_text("a single document")
        with pytest.raises(InputError, match="none is left to train on"):
            prepare(replace(config, valid_fraction=0.9999))

    @pytest.mark.parametrize("fraction", [-0.1, 1, 1.5])
    def test_a_fraction_that_is_none(self, fraction: float):
        with pytest.raises(InputError, match=f"valid_fraction is {fraction}; it is at least 0"):
            DataConfig(valid_fraction=fraction)


def test_progress_is_told_in_lines(config: DataConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dataset, "_TOLD", 1000)
    told: list[str] = []
    prepare(replace(config, tokenizer="bpe"), told.append)
    assert told[:2] == ["reading the corpus", "training a tokenizer of 8192 entries"]
    assert any(line.startswith("writing train tokens: ") for line in told)
    assert any(line.startswith("writing valid tokens: ") for line in told)
