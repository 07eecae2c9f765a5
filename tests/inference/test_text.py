"""No character is cut, no stop string leaks, and a stream saved anywhere goes on as it was."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retentive.inference.text import TextStream

STORY = "naïve café 世界 👩‍🚀 end"


def pieces(stream, tokens):
    return [stream.push(token) for token in tokens]


def test_every_piece_is_whole_characters(byte_level):
    shown = pieces(TextStream(byte_level), STORY.encode())
    assert "".join(shown) == STORY
    assert "\ufffd" not in "".join(shown)
    assert "世" in shown  # its three bytes come out together


def test_an_unfinished_character_is_not_text(byte_level):
    assert "".join(pieces(TextStream(byte_level), "a世".encode()[:-1])) == "a"


@given(st.lists(st.one_of(st.integers(0, 255), st.integers(0x80, 0xF4)), max_size=80))
def test_any_bytes_at_all(byte_level, tokens):
    """What cannot be text becomes U+FFFD, as decoding it whole would, once that is certain."""
    shown = "".join(pieces(TextStream(byte_level), [*tokens, ord(".")]))
    if not longest_undecodable(tokens) >= 28:  # then patience ends, before the whole is seen
        assert shown == bytes([*tokens, ord(".")]).decode("utf-8", "replace")
    assert shown.endswith(".")


def longest_undecodable(tokens):
    text = bytes(tokens).decode("utf-8", "replace")
    return max(map(len, "".join(c if c == "\ufffd" else " " for c in text).split()), default=0)


def test_patience_with_bytes_that_never_decode_ends(byte_level):
    stream = TextStream(byte_level)
    shown = "".join(pieces(stream, [0x80] * 500 + [ord("a")]))
    assert shown == "\ufffd" * 500 + "a"
    assert len(json.dumps(stream.as_dict())) < 1000


def test_a_tokenizer_that_writes_spaces_by_context(spaced):
    tokens = [spaced.token_to_id(w) for w in ("▁one", "▁two", "x", "▁one")]
    assert pieces(TextStream(spaced), tokens) == ["one", " two", "x", " one"]
    assert pieces(TextStream(spaced, prompt=tokens), tokens[:2]) == [" one", " two"]


def test_characters_from_byte_tokens(spaced):
    tokens = [spaced.token_to_id(f"<0x{byte:02X}>") for byte in "世界".encode()]
    prompt = [spaced.token_to_id("▁one"), *tokens]
    for stream in (TextStream(spaced), TextStream(spaced, prompt=prompt)):
        assert "".join(pieces(stream, tokens)) == "世界"


def test_a_stop_string_across_tokens_never_shows(byte_level):
    stream = TextStream(byte_level, stop=["\nEND"])
    shown = pieces(stream, b"line\nENough\nEND")
    assert "".join(shown) == "line\nENough"
    assert stream.stopped
    assert shown[4:8] == ["", "", "", "\nENo"]  # held until it cannot be the stop string


def test_what_may_begin_a_stop_string_is_held_and_can_be_had(byte_level):
    stream = TextStream(byte_level, stop=["stop"])
    assert "".join(pieces(stream, b"a st")) == "a "
    assert stream.held == "st"
    assert not stream.stopped


def reference_stop(text, stops):
    """Character by character: the text is over as soon as it ends with a stop string."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    cuts=st.randoms(use_true_random=False),
)
def test_stop_strings_against_the_plain_rule(byte_level, text, stops, cuts):
    """However the text is cut into pieces, and saved and loaded between any two of them."""
    stream, shown = TextStream(byte_level, stop=stops), ""
    for token in text.encode():
        if stream.stopped:
            break
        if cuts.random() < 0.3:
            saved = json.loads(json.dumps(stream.as_dict()))
            stream = TextStream.from_dict(saved, byte_level, stops)
        shown += stream.push(token)
    expected, stopped = reference_stop(text, stops)
    assert stream.stopped == stopped
    assert shown + stream.held == expected


def test_of_several_stops_in_one_piece_the_first_complete_one_counts(spaced):
    stream = TextStream(spaced, stop=["tw", "e t"])
    shown = pieces(stream, [spaced.token_to_id("▁one"), spaced.token_to_id("▁two")])
    assert shown == ["on", ""]
    assert stream.stopped


@pytest.mark.parametrize("seed", range(5))
def test_saved_anywhere_it_goes_on_as_it_was(byte_level, seed):
    cuts = random.Random(seed)
    tokens = (STORY * 3).encode()
    stream, shown = TextStream(byte_level, stop=["never"]), ""
    for token in tokens:
        if cuts.random() < 0.3:
            saved = json.loads(json.dumps(stream.as_dict()))
            stream = TextStream.from_dict(saved, byte_level, ["never"])
        shown += stream.push(token)
    assert shown + stream.held == STORY * 3
