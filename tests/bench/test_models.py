"""The equals of a model: as many parameters, whatever they are made of."""

import pytest

from retentive.bench.contenders import CONTENDERS, Entry, chosen
from retentive.bench.estimates import needed_bytes
from retentive.bench.models import BENCHMARK_SIZES, subject
from retentive.models.counts import decode_bytes, parameters, state_bytes, weight_bytes


@pytest.mark.parametrize("size", ["38m", "110m", "demo", "1.3b"])
def test_all_contenders_have_as_many_parameters(size):
    model = subject(size)
    wanted = sum(parameters(model.config).values())
    for contender in CONTENDERS:
        if "decode" in contender.tasks:
            count = sum(parameters(contender.equal(model)).values())
            assert abs(count - wanted) < 0.01 * wanted, contender.name


def test_sizes_are_what_they_are_called():
    for size in BENCHMARK_SIZES:
        count = sum(parameters(subject(size).config).values())
        assert abs(count / 1e6 - int(size[:-1])) < 0.03 * int(size[:-1])


def test_decoding_takes_what_its_bytes_say():
    model = subject("38m")
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
    entry = Entry(peer, subject("38m"))
    case = {"task": "train", "dtype": "float32", "batch": 1, "tokens": 8192}
    parallel, chunked = (needed_bytes(entry, case, {"chunk_size": C}) for C in (None, 128))
    assert parallel - chunked == 32 * 2**30
    (ours,) = chosen("train", "retnet")
    assert needed_bytes(Entry(ours, subject("38m")), case, {}) < chunked  # no whole logits


def test_of_a_prompt_that_ours_reads_only_itself_counts():
    (ours,) = chosen("prefill", "retnet")
    entry, case = Entry(ours, subject("38m")), {"task": "prefill", "dtype": "float32"}
    short, long = (needed_bytes(entry, {**case, "tokens": n}, {}) for n in (8192, 2 * 10**9))
    assert 8 <= (long - short) / (2 * 10**9 - 8192) <= 64
