"""The code of the contenders' processes, run in this one: it measures the case it was given."""

from importlib.util import find_spec

import pytest
import torch
import zoo

from retentive.bench.contenders import Entry, chosen
from retentive.bench.models import ReferenceModel
from retentive.bench.workers import huggingface, ours, peers
from retentive.bench.workers.along import TIMED, prepare_along
from retentive.models.checkpoint import save_model
from retentive.models.counts import decode_bytes, state_bytes
from retentive.models.retnet import RetNet
from retentive.models.transformer import Transformer

SMALL = zoo.retnet(vocab_size=32, hidden_size=64, num_hidden_layers=2, num_heads=2)
MODEL = ReferenceModel("small", SMALL)
FIXED = {"device": "cpu", "dtype": "float32", "threads": 1}


def case(task: str, name: str, model: ReferenceModel = MODEL, **sizes: int) -> dict:
    (contender,) = chosen(task, name)
    return Entry(contender, model).case({"task": task, **FIXED, **sizes})


def send(answer: dict) -> None:
    pass


@pytest.mark.parametrize("name", ["retnet", "retnet-eager", "transformer", "transformer-gqa"])
def test_a_decoder_reads_on_from_its_context(name):
    made = ours.Ours(case("decode", name))
    decoder = made.decoder(batch=3, context=70)
    assert decoder(torch.tensor([1, 2, 3])).shape == (3, 32)
    assert decoder(torch.tensor([1, 2, 3])).isfinite().all()
    if isinstance(made.model, Transformer):
        assert decoder.state.positions.tolist() == [72] * 3


def test_a_runner_gives_what_the_model_gives(tmp_path):
    save_model(RetNet(SMALL), tmp_path)
    model = ReferenceModel("mine", SMALL, tmp_path)
    tokens = torch.tensor([5, 6])
    with torch.inference_mode():
        by_runner, by_model = (
            ours.Ours(case("decode", name, model)).decoder(2, 70)(tokens)
            for name in ("retnet", "retnet-eager")
        )
    torch.testing.assert_close(by_runner, by_model, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["retnet", "transformer"])
def test_bytes_read_are_those_counted(name):
    made = ours.Ours(case("decode", name))
    assert made.facts["parameters"] == made.model.num_parameters()
    config = made.model.config
    assert made.facts["weight_bytes"] == decode_bytes(config, batch=0, context=0)


def test_a_fork_goes_on_alone():
    for name in ("retnet", "retnet-eager"):
        decoder = ours.Ours(case("decode", name)).decoder(1, 70)
        fork = decoder.fork()
        first, again = (d(torch.tensor([3])) for d in (decoder, fork))
        torch.testing.assert_close(first, again)


@pytest.mark.parametrize("name", ["transformer", "transformer-gqa8"])
def test_a_recorded_step_is_the_step_behind_its_context(name):
    small = zoo.retnet(vocab_size=32, hidden_size=512, num_hidden_layers=2, num_heads=2)
    decode = case("decode", name, ReferenceModel("small", small), tokens=16)
    made, tokens = ours.Ours(decode), torch.tensor([3, 5])
    with torch.inference_mode():
        decoder = ours.CacheDecoder.empty(made.model, 2, 70 + 1)
        decoder.skip(70)
        recorded = ours.RecordedDecoder(decoder, lambda step: step)
        first, again = recorded(tokens), recorded(tokens)
        assert torch.equal(first, again) and torch.equal(first, decoder(tokens))
    assert decoder.sdpa_kernel.endswith(("attention", "math"))
    assert ours.training_kernel(made.model, decode).endswith(("attention", "math"))


@pytest.mark.parametrize("name", ["retnet", "retnet-eager", "transformer"])
def test_a_decoder_knows_the_bytes_of_its_state(name):
    made = ours.Ours(case("decode", name))
    decoder = made.decoder(batch=3, context=70)
    with torch.inference_mode():
        decoder(torch.tensor([1, 2, 3]))
    assert decoder.state_bytes == 3 * state_bytes(made.model.config, 71)


def test_states_kept_along_a_sequence_can_be_gone_on_from():
    made = ours.Ours(case("decode", "retnet"))
    marks = []
    settings = {**case("decode", "retnet"), "batch": 1, "marks": [64, 128], "keep_states": True}
    decoder = made.fresh_decoder(1, 128 + TIMED)
    _, run = prepare_along(decoder, settings, lambda answer: marks.append(answer["message"]))
    assert [mark["position"] for mark in marks] == [64, 128]
    assert len(run(at=0, times=4)["seconds"]) == len(run(at=1, times=4)["seconds"]) == 4


def test_math_attention_computes_the_same_loss(tmp_path):
    tokens = torch.randint(0, 32, (2, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for name in ("transformer", "transformer-math"):
        made = ours.Ours(case("train", name))
        made.model.init_weights(seed=0)
        losses.append(made.loss(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()))
    torch.testing.assert_close(*losses)


def test_a_missing_package_is_an_error():
    """None of the peers is importable outside their own processes."""
    for name in ("yet-another-retnet", "torchscale"):
        if find_spec(name.replace("-", "_")) is None:
            with pytest.raises(ModuleNotFoundError):
                peers.prepare(case("decode", name, batch=1, context=4), send)


def test_llama_is_measured_in_every_task():
    for task, sizes, more in (
        ("train", {"batch": 2, "tokens": 8}, ()),
        ("prefill", {"tokens": 8}, ()),
        ("decode", {"batch": 2, "context": 8, "room": 16}, ("llama-static", "llama-gqa-static")),
    ):
        for name in ("llama", "llama-gqa", *more):
            facts, run = huggingface.prepare(case(task, name, **sizes), send)
            equal = SMALL_TRANSFORMER[name.removesuffix("-static")]
            count = sum(x.numel() for x in Transformer(equal).parameters())
            assert abs(facts["parameters"] - count) < 0.02 * count
            assert all(seconds > 0 for seconds in run()["seconds"])


SMALL_TRANSFORMER = {
    name: Entry(chosen("train", name)[0], MODEL).config() for name in ("llama", "llama-gqa")
}
