"""Whether the kernels for CPUs can run here; imports none of them."""

import ctypes
import functools
import logging
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

log = logging.getLogger(__name__)

LIBRARY = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
THREADS = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")


@functools.cache
def available() -> bool:
    """With numba, where the threads that torch computes with can be borrowed: on Linux."""
    if not sys.platform.startswith("linux") or find_spec("numba") is None or not _has_threads():
        return False
    try:
        from numba import config
    except Exception as error:  # whatever an import of other packages comes to
        log.warning("decoding is slower for want of numba: %s: %s", type(error).__name__, error)
        return False
    disabled = bool(getattr(config, "DISABLE_JIT", False))
    if disabled:
        log.warning("decoding is slower, for NUMBA_DISABLE_JIT is set")
    return not disabled


def _has_threads() -> bool:
    try:
        return all(hasattr(ctypes.CDLL(str(LIBRARY)), name) for name in THREADS)
    except OSError:
        return False
