"""The contenders beside a model: as many parameters, whatever their architecture."""

import pytest
import zoo

from retentive.bench.contenders import CONTENDERS, Entry, chosen, entries, entries_of_itself
from retentive.bench.estimates import needed_bytes
from retentive.bench.models import BENCHMARK_SIZES, ReferenceModel, grows, reference_model
from retentive.models.counts import decode_bytes, parameters, state_bytes, weight_bytes
from retentive.models.matching import matching_transformer

RETNET = zoo.retnet(vocab_size=64, hidden_size=256, num_hidden_layers=2, num_heads=4)
MHA = matching_transformer(RETNET)
GQA = matching_transformer(RETNET, num_kv_heads=2)
KINDS = {"retnet": RETNET, "mha": MHA, "gqa": GQA}


@pytest.mark.parametrize("size", ["38m", "110m", "demo", "1.3b", *KINDS])
def test_all_contenders_have_as_many_parameters(size):
    model = ReferenceModel(size, KINDS[size]) if size in KINDS else reference_model(size)
    wanted = sum(parameters(model.config).values())
    for contender in CONTENDERS:
        if "decode" in contender.tasks:
            count = sum(parameters(contender.parameter_matched(model)).values())
            assert abs(count - wanted) < 0.01 * wanted, contender.name


@pytest.mark.parametrize(
    ("kind", "itself"), [("retnet", ["retnet", "retnet-eager"]), ("mha", ["transformer"])]
)
def test_a_model_that_is_one_of_the_contenders_is_this_row(kind, itself):
    found = entries("decode", model=ReferenceModel("mine", KINDS[kind]))
    assert [entry.contender.name for entry in found if entry.is_reference] == itself
    assert "model" not in [entry.contender.name for entry in found]


def test_any_other_model_has_a_row_of_its_own_which_is_the_first(tmp_path):
    model = ReferenceModel("mine", GQA, tmp_path)
    own, *others = entries("decode", model=model)
    assert own.contender.name == "model" and own.config() == GQA
    assert own.case({})["folder"] == str(tmp_path) and own.case({})["form"] == "attention"
    assert {"retnet", "transformer", "llama"} <= {entry.contender.name for entry in others}
    ours = [entry for entry in others if entry.contender.worker == "ours"]
    assert not any(entry.is_reference or "folder" in entry.case({}) for entry in ours)


def test_contenders_that_are_named_are_those_that_take_part():
    names = [entry.contender.name for entry in entries("decode", "llama", ReferenceModel("", GQA))]
    assert names == ["llama"]
    names = [e.contender.name for e in entries("decode", "model,retnet", ReferenceModel("", MHA))]
    assert names == ["model", "retnet"]


def test_a_further_model_is_measured_as_the_contender_that_it_is():
    for config, names in ((RETNET, ["retnet"]), (GQA, ["model"])):
        model = ReferenceModel("second", config)
        found = entries_of_itself(entries("decode", "retnet,llama", model), "decode")
        assert [entry.contender.name for entry in found] == names
        assert all(entry.config() == config for entry in found)


def test_the_states_of_retnets_do_not_grow():
    assert [grows(config) for config in KINDS.values()] == [False, True, True]


def test_sizes_are_what_they_are_called():
    for size in BENCHMARK_SIZES:
        count = sum(parameters(reference_model(size).config).values())
        assert abs(count / 1e6 - int(size[:-1])) < 0.03 * int(size[:-1])


def test_decoding_takes_what_its_bytes_say():
    model = reference_model("38m")
    entry = Entry(
        next(c for c in CONTENDERS if c.name == "transformer" and "decode" in c.tasks), model
    )
    case = {"task": "decode", "device": "cpu", "dtype": "float32", "batch": 8, "context": 8192}
    caches = 8 * 8 * 2 * 8192 * 512 * 4  # rows, layers, keys and values, tokens, width, bytes
    assert needed_bytes(entry, case, {}) == weight_bytes(entry.config()) + caches
    assert state_bytes(entry.config(), 8192) * 8 == caches
    assert decode_bytes(entry.config(), 8, 8192) < needed_bytes(entry, case, {})


def test_scores_that_a_peer_keeps_for_its_backward_pass_are_counted():
    """Two of 8 heads · 8192² float32 in each of 8 layers: 32 GiB, beside all else."""
    (peer,) = chosen("train", "yet-another-retnet")
    entry = Entry(peer, reference_model("38m"))
    case = {"task": "train", "dtype": "float32", "batch": 1, "tokens": 8192}
    parallel, chunked = (needed_bytes(entry, case, {"chunk_size": C}) for C in (None, 128))
    assert parallel - chunked == 32 * 2**30
    (ours,) = chosen("train", "retnet")
    assert needed_bytes(Entry(ours, reference_model("38m")), case, {}) < chunked  # no whole logits


def test_of_a_long_prompt_only_the_tokens_themselves_count():
    (ours,) = chosen("prefill", "retnet")
    entry, case = Entry(ours, reference_model("38m")), {"task": "prefill", "dtype": "float32"}
    short, long = (needed_bytes(entry, {**case, "tokens": n}, {}) for n in (8192, 2 * 10**9))
    assert 8 <= (long - short) / (2 * 10**9 - 8192) <= 64
