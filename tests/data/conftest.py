import random

import pytest
from tokenizers import Tokenizer

from retentive.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def python_text() -> str:
    """A text with indented, empty and unindented lines, the same every time."""
    dice = random.Random(0)
    words = ["def", "return", "self", "value", "état", "x", "==", "(y)", "42", "🙂"]
    lines = (
        "    " * dice.randrange(3) + " ".join(dice.choices(words, k=dice.randrange(7)))
        for _ in range(3000)
    )
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def bpe(python_text: str) -> Tokenizer:
    tokenizer = train_tokenizer([python_text], 400)
    assert tokenizer.get_vocab_size() > 280
    return tokenizer
