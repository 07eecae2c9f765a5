"""Where the kernels cannot be had, decoding goes by torch's operations."""

import sys

import pytest

from retentive.kernels.cpu import available as module
from retentive.kernels.cpu.available import available


@pytest.fixture(autouse=True)
def fresh():
    available.cache_clear()
    yield
    available.cache_clear()


def test_other_systems(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not available()


def test_threads_of_another_kind(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "LIBRARY", tmp_path / "none.so")
    assert not available()


def test_without_numba(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert not available()


@pytest.mark.skipif(not available(), reason="needs numba, and Linux")
def test_a_numba_that_does_not_go_with_what_is_here(monkeypatch, caplog):
    """Such as one for an older numpy: said once, not at every step."""
    monkeypatch.setattr(module, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "numba", None)
    assert not available()
    assert not available()
    assert caplog.text.count("for want of numba") == 1
