"""Whether the kernels for CPUs can run here; imports none of them."""

import ctypes
import functools
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch

LIBRARY = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
THREADS = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")


@functools.cache
def available() -> bool:
    """With numba, where the threads that torch computes with can be borrowed: on Linux."""
    if not sys.platform.startswith("linux") or find_spec("numba") is None or not _has_threads():
        return False
    try:
        import numba  # noqa: F401
    except ImportError as error:
        warnings.warn(f"decoding is slower for want of numba: {error}", stacklevel=2)
        return False
    return True


def _has_threads() -> bool:
    try:
        return all(hasattr(ctypes.CDLL(str(LIBRARY)), name) for name in THREADS)
    except OSError:
        return False
