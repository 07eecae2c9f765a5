"""Why the kernels may not be had: each reason is told, and by "auto" warned of once."""

import importlib.metadata
import warnings
from types import SimpleNamespace

import pytest
import torch
from triton.backends.nvidia import compiler

from retentive.kernels.triton import available
from retentive.ops import backends


@pytest.fixture
def hopper(monkeypatch):
    """An H100 with a sound toolchain, of which a test may take something away."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(compiler, "get_ptxas", lambda arch: SimpleNamespace(version="13.4"))
    available._unavailable_on_gpu.cache_clear()
    yield
    available._unavailable_on_gpu.cache_clear()


def set_ptxas(monkeypatch, version):
    monkeypatch.setattr(compiler, "get_ptxas", lambda arch: SimpleNamespace(version=version))


def test_nothing_is_missing(hopper):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert available.unavailable("cuda", 0) is None


CHANGES = {
    "no triton": lambda patch: patch.setattr(available, "find_spec", lambda name: None),
    "old triton": lambda patch: patch.setattr(importlib.metadata, "version", lambda n: "3.5.1+x"),
    "amd": lambda patch: patch.setattr(torch.version, "hip", "6.4"),
    "old gpu": lambda patch: patch.setattr(torch.cuda, "get_device_capability", lambda i: (7, 5)),
    "old ptxas": lambda patch: set_ptxas(patch, "12.9"),
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("no triton", r'not installed \(pip install "retentive\[triton\]"\)'),
        ("old triton", r"Triton 3\.5\.1\+x is too old \(pip install 'triton>=3\.6'\)"),
        ("amd", "for NVIDIA GPUs"),
        ("old gpu", r"compute capability 8\.0 or later, this GPU has 7\.5"),
        (
            "old ptxas",
            r"ptxas 12\.9, which Triton uses here, .* TRITON_PTXAS_PATH .* 13\.3 or later",
        ),
    ],
)
def test_a_reason_is_told_and_warned_of_once(hopper, monkeypatch, change, words):
    CHANGES[change](monkeypatch)
    with pytest.warns(UserWarning, match=f"without its GPU kernels: .*{words}"):
        reason = available.unavailable("cuda", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert available.unavailable("cuda", 0) == reason
    assert reason and "\n" not in reason


def test_only_hopper_needs_the_new_assembler(hopper, monkeypatch):
    set_ptxas(monkeypatch, "12.8")
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i, c=capability: c)
        available._unavailable_on_gpu.cache_clear()
        assert available.unavailable("cuda", 0) is None


def tensor(device, dtype, width):
    """What the choice looks at; there may be no such device."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 8, 2, width))


@pytest.mark.parametrize(
    ("device", "dtype", "K", "chunk_size", "taken"),
    [
        ("cuda:0", torch.bfloat16, 64, None, "triton"),
        ("cuda:0", torch.float32, 64, 128, "triton"),
        ("cuda:0", torch.float64, 64, None, "torch"),
        ("cuda:0", torch.bfloat16, 8, None, "torch"),
        ("cuda:0", torch.bfloat16, 64, 100, "torch"),
        ("cpu", torch.bfloat16, 64, None, "torch"),  # also where the interpreter could run it
    ],
)
def test_auto_takes_the_kernels_where_they_can_do_it(hopper, device, dtype, K, chunk_size, taken):
    q, v = tensor(device, dtype, K), tensor(device, dtype, 128)
    chosen = backends.choose("auto", "chunkwise", q, v, chunk_size)  # pyright: ignore
    assert chosen is backends.BACKENDS[taken].run
