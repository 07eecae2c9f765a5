"""Why the kernels may not be had: the device, what is installed, or what is asked of them.

Triton itself is imported only where all but the last look at its assembler is settled.
"""

import importlib.metadata
import os
import re
import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

OLDEST = (3, 6)
"""Triton from which on the kernels are checked."""
SOUND_PTXAS = (13, 3)
"""CUDA release whose ptxas keeps the registers that a wgmma in flight still reads.

Those before may use them again too early, and results are wrong in silence (Triton issue 9433,
pull request 11781; CUDA 13.3 release notes). Each product of scores and values is of that kind.
"""
INTERPRET = "TRITON_INTERPRET"


def refusal(form: str, q: Tensor, v: Tensor, chunk_size: int | None) -> str | None:
    """Why the kernels cannot do this, in a part of a sentence; None where they can."""
    return unavailable(q.device.type, q.device.index) or _unsupported(form, q, v, chunk_size)


def _unsupported(form: str, q: Tensor, v: Tensor, chunk_size: int | None) -> str | None:
    K, V = q.shape[-1], v.shape[-1]
    if form != "chunkwise":
        return f"it has the chunkwise form, not the {form} one"
    if q.dtype == torch.float64:
        return "it computes in float32, the inputs are float64"
    if not 16 <= K <= 256 or not 16 <= V <= 512:
        return f"it takes K from 16 to 256 and V from 16 to 512, got K {K} and V {V}"
    if chunk_size is not None and (chunk_size % 64 or chunk_size > 4096):
        return f"its chunk_size is a multiple of 64 up to 4096, got {chunk_size}"
    return None


def unavailable(device_type: str, index: int | None) -> str | None:
    """Why no kernel runs on this device; the answer does not change while a process lives."""
    if device_type == "cuda":
        return _unavailable_on_gpu(torch.cuda.current_device() if index is None else index)
    if os.environ.get(INTERPRET) != "1":
        return (
            f"its kernels need a CUDA device and the tensors are on {device_type} "
            f"(with {INTERPRET}=1 from the start they run there, slowly)"
        )
    if reason := _not_installed():
        return reason
    from retentive.kernels.triton import interpreter

    interpreter.repair()
    return None


# A constant to torch.compile. torch.compiler.assume_constant_result sets no more, but imports
# torch._dynamo for it, which takes a second.
unavailable._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@cache
def _unavailable_on_gpu(index: int) -> str | None:
    """As `unavailable`, with a warning: who leaves the choice to us should know what is lost."""
    reason = _not_installed() or _unsuited(index)
    if reason:
        warnings.warn(f"retention runs without its GPU kernels: {reason}", stacklevel=2)
    return reason


def _not_installed() -> str | None:
    if find_spec("triton") is None:
        return 'Triton is not installed (pip install "retentive[triton]")'
    version = importlib.metadata.version("triton")
    if _numbers(version) < OLDEST:
        return f"Triton {version} is too old (pip install 'triton>=3.6')"
    return None


def _unsuited(index: int) -> str | None:
    if torch.version.hip:
        return "its kernels are for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        shown = ".".join(map(str, capability))
        return f"its kernels need compute capability 8.0 or later, this GPU has {shown}"
    return unsound_assembler() if capability[0] == 9 else None


def unsound_assembler() -> str | None:
    """What is wrong with the ptxas that Triton uses on sm_90, and what to do."""
    from triton.backends.nvidia.compiler import get_ptxas

    ptxas = get_ptxas(90)
    if _numbers(ptxas.version) >= SOUND_PTXAS:
        return None
    return (
        f"ptxas {ptxas.version}, which Triton uses here, may assemble them wrongly for this GPU; "
        "point TRITON_PTXAS_PATH at a ptxas of CUDA 13.3 or later (pip install nvidia-cuda-nvcc)"
    )


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version: "3.9.0+git" is (3, 9)."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
