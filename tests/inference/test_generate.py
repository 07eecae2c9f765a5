"""The library call; what it is made of is tested beside it."""

import pytest
import torch
import zoo

import retentive
from retentive.errors import InputError
from retentive.models.retnet import RetNet


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 1}
    return RetNet(zoo.retnet(**sizes, dropout=0.5))


def test_a_string_gives_a_string_and_a_list_a_list(model, byte_level):
    text = retentive.generate(model, byte_level, "abc", max_new_tokens=20)
    assert isinstance(text, str)
    assert retentive.generate(model, byte_level, ["abc", "d"], max_new_tokens=20)[0] == text


def test_the_pieces_are_the_texts(model, byte_level):
    texts = ["", ""]

    def take(row, text):
        assert text
        texts[row] += text

    result = retentive.generate(
        model, byte_level, ["abc", "d"], max_new_tokens=30, stop="q\x00", on_text=take
    )
    assert texts == result


def test_a_seed_decides(model, byte_level):
    first, again, other = (
        retentive.generate(model, byte_level, "abc", max_new_tokens=30, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_model_in_training_is_left_in_training(model, byte_level):
    model.train()
    text = retentive.generate(model, byte_level, "abc", max_new_tokens=20)
    assert model.training
    model.eval()
    assert retentive.generate(model, byte_level, "abc", max_new_tokens=20) == text
    assert not model.training


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"stop": ""}, "stop"),
        ({"prompts": []}, "no prompt"),
    ],
)
def test_bad_options(model, byte_level, options, complaint):
    with pytest.raises(InputError, match=complaint):
        retentive.generate(model, byte_level, **{"prompts": "a", **options})
