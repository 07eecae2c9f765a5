"""`--device` and `--dtype`: names to torch objects, with a reason where a device cannot be had.

And how this process uses the memory of its CPU.
"""

import ctypes

import torch

from retentive.errors import InputError, nearest

DEVICES = ("cpu", "cuda", "mps")
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def available_devices() -> list[str]:
    """The devices of this machine, best first."""
    cuda = ["cuda"] if torch.cuda.is_available() else []
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return [*cuda, *mps, "cpu"]


def resolve_device(name: str) -> torch.device:
    """A device by name: cpu, cuda, cuda:1, mps, or auto for the best of this machine.

    Raises InputError for a name that is unknown or a device that is not there.
    """
    present = available_devices()
    if name == "auto":
        return torch.device(present[0])
    kind, _, index = name.partition(":")
    if kind not in DEVICES or (index and not index.isdigit()):
        raise InputError(
            f"unknown device {name!r}{nearest(name, DEVICES)}; "
            f"choose auto or one of {', '.join(DEVICES)}"
        )
    if kind not in present:
        reason = "torch sees no usable GPU" if kind == "cuda" else "it needs a Mac with Metal"
        raise InputError(
            f"device {name!r} is not available: {reason}; this machine has {', '.join(present)}"
        )
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise InputError(
            f"device {name!r} does not exist; this machine has {torch.cuda.device_count()} GPUs"
        )
    return torch.device(name)


def resolve_dtype(name: str) -> torch.dtype:
    """A dtype by name: float32, bfloat16, float16 or float64."""
    if name not in DTYPES:
        raise InputError(
            f"unknown dtype {name!r}{nearest(name, DTYPES)}; choose one of {', '.join(DTYPES)}"
        )
    return DTYPES[name]


def keep_freed_memory() -> None:
    """Memory that this process frees waits for its next tensors, instead of going back.

    glibc returns blocks of 32 MB and more at once, and the system clears every page anew when the
    next tensor wants them: up to a third of a training step on a CPU. Only glibc is told.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_max = -1, -4  # malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)
