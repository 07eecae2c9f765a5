"""Kernels run on the GPU where there is one, else on the CPU in Triton's interpreter, repaired.

Triton asks for TRITON_INTERPRET when it is imported (tests/conftest.py does that) and when a kernel
is defined, which is now; `retentive` asks when a kernel is to be run, which is in a test. Other
tests see nothing of it.
"""

import pkgutil
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

INTERPRETED = not torch.cuda.is_available()

if find_spec("triton") is None:  # there is none for this platform
    collect_ignore_glob = ["test_*.py"]
else:
    from retentive.kernels import triton as kernels

    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            patch.setenv("TRITON_INTERPRET", "1")
            from retentive.kernels.triton import interpreter

            interpreter.repair()
        for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
            import_module(module.name)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    yield


@pytest.fixture(autouse=True)
def filled_with_nan() -> Iterator[None]:
    """`torch.empty` holds NaN: an element that no kernel writes, or that is read before, shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = before
