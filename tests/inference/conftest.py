import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

END = "<|end|>"


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    """A byte a token (ids 0-255 in byte order), then the end token, as the data room makes them."""
    shown = bytes_to_characters()
    tokenizer = Tokenizer(models.BPE(vocab={c: byte for byte, c in shown.items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return tokenizer


def bytes_to_characters() -> dict[int, str]:
    """The character by which byte-level BPE writes each byte: itself where it prints."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printing]
    return {b: chr(b) for b in printing} | {b: chr(256 + i) for i, b in enumerate(rest)}


@pytest.fixture(scope="session")
def spaced() -> Tokenizer:
    """A word a token, a space written by the word after it, rare characters by their bytes."""
    words = ["▁one", "▁two", "▁", "x", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={w: i for i, w in enumerate(words)},
            merges=[],
            byte_fallback=True,
            ignore_merges=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer
