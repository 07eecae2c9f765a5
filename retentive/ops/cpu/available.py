"""Whether the kernels for CPUs can run here; imports neither them nor what they need."""

import ctypes
import functools
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

LIBRARY = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
THREADS = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")


@functools.cache
def available() -> bool:
    """With numba, where the threads that torch computes with can be borrowed: on Linux."""
    if not sys.platform.startswith("linux") or find_spec("numba") is None:
        return False
    try:
        return all(hasattr(ctypes.CDLL(str(LIBRARY)), name) for name in THREADS)
    except OSError:
        return False


def on_compiling(say: Callable[[], None]) -> None:
    """Calls `say`, once, if kernels have to be compiled: some seconds, once for a processor."""
    if not available():
        return
    from numba.core import event

    class Listener(event.Listener):
        def on_start(self, event: event.Event) -> None:
            nonlocal told
            if not told:
                told = True
                say()

        def on_end(self, event: event.Event) -> None:
            pass

    told = False
    event.register("numba:compile", Listener())
