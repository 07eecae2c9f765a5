import gzip
import io
import json
import lzma
import os
import random
import sysconfig
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retentive.data import corpus
from retentive.data.corpus import Document, find_files, fingerprint, read_documents
from retentive.errors import InputError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def texts(*sources: str, **options) -> list[str]:
    return [document.text for document in read_documents(sources, **options)]


def test_a_file_is_a_document_under_its_name(folder: Path):
    Path("a.md").write_text("# a\r\n\fb é\n", newline="")
    assert list(read_documents(["a.md"])) == [Document("a.md", "# a\r\n\fb é\n")]


def test_form_feeds_separate_the_documents_of_a_txt_file(folder: Path):
    Path("a.txt").write_text("one\n\ftwo\f\f \nthree")
    assert list(read_documents(["a.txt"])) == [
        Document("a.txt", "one\n"),
        Document("a.txt#1", "two"),
        Document("a.txt#3", " \nthree"),
    ]


def test_compressed_files_read_like_plain_ones(folder: Path):
    Path("a.txt.gz").write_bytes(gzip.compress(b"one\ftwo"))
    Path("b.xz").write_bytes(lzma.compress(b"three"))
    Path("c.jsonl.xz").write_bytes(lzma.compress(b'{"text": "four"}\n'))
    assert texts("a.txt.gz", "b.xz", "c.jsonl.xz") == ["one", "two", "three", "four"]


def test_json_lines(folder: Path):
    Path("a.jsonl").write_text('{"text": "one\\ftwo"}\n\n{"n": 1, "text": "\\u00e9"}\n')
    assert list(read_documents(["a.jsonl"])) == [
        Document("a.jsonl:1", "one\ftwo"),
        Document("a.jsonl:3", "é"),
    ]
    Path("b.jsonl").write_text('{"body": "x"}\n')
    assert texts("b.jsonl", text_field="body") == ["x"]


def test_folders_and_globs_are_sorted_and_files_come_once(folder: Path):
    for name in ("d/b", "d/a", "d/c/x.txt", "d/.hidden", "d/.git/config", "e.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    assert texts("d") == ["d/a", "d/b", "d/c/x.txt"]
    assert texts("**/*.txt") == ["d/c/x.txt", "e.txt"]
    assert texts("e.txt", "d", "*.txt", "d/b") == ["e.txt", "d/a", "d/b", "d/c/x.txt"]


def test_empty_documents_and_byte_order_marks_are_left_out(folder: Path):
    Path("a.txt").write_bytes(b"")
    Path("b.txt").write_bytes(b" \n\t")
    Path("c.txt").write_bytes(b"\xef\xbb\xbftext")
    assert texts("*.txt") == ["text"]


class TestBadInput:
    """One line each: what was given, what to do."""

    def complaint(self, *sources: str, **options) -> str:
        with pytest.raises(InputError) as error:
            texts(*sources, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    def test_no_sources(self):
        assert "no corpus: give files" in self.complaint()

    def test_a_missing_file_names_the_nearest(self, folder: Path):
        Path("corpus.txt").write_text("x")
        assert "corpsu.txt does not exist (did you mean 'corpus.txt'?)" in self.complaint(
            "corpsu.txt"
        )
        assert "no/such/folder does not exist" in self.complaint("no/such/folder")

    def test_an_unknown_user(self):
        assert "~nosuchuser/x does not exist" in self.complaint("~nosuchuser/x")

    def test_what_is_no_regular_file(self, folder: Path):
        Path("d").mkdir()
        os.mkfifo("d/pipe")
        assert "d/pipe is no regular file" in self.complaint("d/pipe")
        assert "/dev/null is no regular file" in self.complaint("/dev/null")
        assert "the folder d holds no files" in self.complaint("d")

    def test_a_folder_without_files(self, folder: Path):
        Path("d/.git").mkdir(parents=True)
        assert "the folder d holds no files" in self.complaint("d")

    def test_a_glob_without_matches(self, folder: Path):
        Path("d.txt").mkdir()
        assert "no file matches *.txt" in self.complaint("*.txt")

    @pytest.mark.parametrize(
        ("content", "why"),
        [(b"abc\xff", "can't decode byte 0xff in position 3"), (b"a\0b", "binary")],
    )
    def test_what_is_no_text_is_named_with_the_option_that_skips_it(
        self, folder: Path, caplog: pytest.LogCaptureFixture, content: bytes, why: str
    ):
        corpus._tell_left_out.cache_clear()
        Path("a.txt").write_bytes(b"good\f" + content + b"\falso good")
        line = self.complaint("a.txt")
        assert line.startswith("a.txt#1 is not UTF-8 text") and why in line
        assert "--data.skip-undecodable" in line
        for _ in range(2):
            assert texts("a.txt", skip_undecodable=True) == ["good", "also good"]
        assert caplog.messages == ["left out a.txt#1: not UTF-8 text"]

    @pytest.mark.parametrize("name", ["a.txt.gz", "a.xz"])
    def test_damaged_compressed_files(self, folder: Path, name: str):
        packed = {".gz": gzip, ".xz": lzma}[Path(name).suffix].compress(
            random.Random(0).randbytes(999)
        )
        for content in (packed[:-100], b"not packed", packed[:200] + b"????" + packed[204:]):
            Path(name).write_bytes(content)
            assert f"{name} is damaged, or not a" in self.complaint(name)

    @pytest.mark.parametrize(
        ("line", "why"),
        [
            ("{text: 1}", "a.jsonl:2 is not a line of JSON"),
            ("[1]", "a.jsonl:2 is no JSON object"),
            ('{"texts": "x", "id": 1}', "no field 'text' (did you mean 'texts'?), only texts, id"),
            ('{"text": 7}', "the field 'text' holds int, not text"),
            ('{"text": "\\ud800"}', "a.jsonl:2 is not UTF-8 text"),
        ],
    )
    def test_json_lines_that_hold_no_text(self, folder: Path, line: str, why: str):
        Path("a.jsonl").write_text(f'{{"text": "x"}}\n{line}\n')
        assert why in self.complaint("a.jsonl")


@pytest.mark.parametrize("separated", [True, False])
@given(st.lists(st.text("aé🙂\n", max_size=40), min_size=1, max_size=4))
def test_long_documents_are_cut_and_nothing_is_lost(separated: bool, parts: list[str]):
    text = "\f".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "LONGEST", 8)
        cut = list(corpus._parts(io.BytesIO(text.encode()), separated))
    whole = [part.decode() for part in cut]  # no character is cut in two
    assert "".join(whole) == ("".join(parts) if separated else text)
    assert separated or all(len(part) <= 8 for part in cut)


def test_a_file_larger_than_memory_is_read_in_parts(folder: Path):
    with gzip.open("a.txt.gz", "wb", compresslevel=1) as file:
        for _ in range(16):
            file.write(b"A line of text like any other line.\n" * 2**18)  # 9 MB
    tracemalloc.start()
    size = sum(len(document.text) for document in read_documents(["a.txt.gz"]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 16 * 36 * 2**18  # 151 MB
    assert peak < 6 * corpus.LONGEST


class TestFingerprint:
    def test_is_of_the_content_and_not_of_the_place(self, folder: Path):
        for place in ("here", "there"):
            Path(place).mkdir()
            Path(place, "a.txt").write_text("one")
            Path(place, "b.txt").write_text("two")
        assert (
            fingerprint(["here"])
            == fingerprint(["there"])
            == fingerprint(["here/a.txt", "there/b.txt"])
        )
        Path("there/b.txt").write_text("too")
        assert fingerprint(["here"]) != fingerprint(["there"])

    def test_knows_what_is_read_differently(self, folder: Path):
        line = json.dumps({"text": "x"})
        names = ["a.txt", "a.jsonl", "a.md"]
        for name in names:
            Path(name).write_text(line)
        assert len({fingerprint([name]) for name in names}) == 3


class TestStdlib:
    def test_holds_code_and_no_tests(self):
        files = find_files(["stdlib"])
        names = {path.name for path in files}
        assert {"argparse.py", "decoder.py"} <= names
        assert not {"topics.py", "test_support.py", "cp1252.py"} & names
        assert sum(path.stat().st_size for path in files) > 5_000_000

    def test_refuses_one_that_is_shipped_in_parts(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        (tmp_path / "os.py").write_text("x = 1\n" * 20_000)
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
        with pytest.raises(InputError, match=r"has 0\.1 MB of sources, too little .* apt install"):
            find_files(["stdlib"])
