"""A contender's side of the pipe: JSON requests on stdin, answers on stdout, each a line.

    {"prepare": case}    builds all that the case needs and runs it once; answers its facts
    {"run": arguments}   answers {"seconds": [...]} of one or more timed runs
    {"memory": true}     answers bytes: at the process's start, at its peak, resident now
    {"release": true}    frees what was prepared

An answer may be {"error": reason}; a long preparation sends {"message": facts} before its answer.
"""

import contextlib
import ctypes
import functools
import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FLUSH_BYTES = 2**30  # 0.3 ms of an H100

Case = dict[str, Any]
Answer = dict[str, Any]
Run = Callable[..., Answer]
Send = Callable[[Answer], None]
Prepare = Callable[[Case, Send], tuple[Answer, Run]]


def serve(load: Callable[[], object], prepare: Prepare) -> None:
    """Answers until stdin ends. `load` imports all that counts as the process's start."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the benchmark's own process handles it
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # the prints of libraries are no answers

    def send(answer: Answer) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    run: Run | None = None
    start: int | None = None
    case: Case = {"device": "cpu"}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "prepare" in request:
                case = request["prepare"]
                run = None  # frees what was prepared before
                torch.set_num_threads(case["threads"])
                on_gpu = case["device"].startswith("cuda")
                if start is None:
                    load()
                    if not on_gpu:
                        warm_libraries(training=case["task"] == "train")
                if on_gpu:  # its memory is that of tensors: each case begins anew
                    forget_peak(case["device"])
                    if case["task"] in ("op", "step"):
                        flush_buffer(case["device"])  # counts as the start, not as the contender's
                if start is None or on_gpu:
                    start = resident_bytes(case["device"])
                facts, run = prepare(case, send)
                send(facts)
            elif "release" in request:
                run = None
                forget_peak(case["device"])
                send({})
            elif "run" in request:
                assert run is not None
                send(run(**request["run"]))
            else:
                send({"start": start, **memory(case["device"])})
        except Exception as error:  # shown in the contender's row
            send({"error": reason(error)})


def warm_libraries(training: bool) -> None:
    """Loads the 70 MB of torch that come with the first custom operator or optimizer.

    They are no model's memory, and importing transformers loads them at once.
    """
    import torch._dynamo

    layer = torch.nn.Linear(64, 64)
    loss = layer(torch.ones(64, 64)).sum()
    if training:
        loss.backward()
        torch.optim.AdamW(layer.parameters(), fused=True).step()


def reason(error: Exception) -> str:
    """One line; the many messages for a lack of memory begin alike."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in lines[0]:
        return f"out of memory: {lines[0]}"
    if type(error).__name__ == "InputError":
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}"


@functools.cache
def flush_buffer(device: str) -> torch.Tensor:
    """A buffer to overwrite, which empties a GPU's L2 cache."""
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)


def memory(device: str) -> dict[str, int]:
    return {"peak": peak_bytes(device), "resident": resident_bytes(device)}


def resident_bytes(device: str) -> int:
    """Memory of this process that is in RAM, or of its tensors on a GPU.

    Where the system does not say, the most that has been in RAM so far.
    """
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except FileNotFoundError:
        return _largest()
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(device: str) -> int:
    """The most that `resident_bytes` has been so far."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        return _largest()
    kilobytes = next(x.split()[1] for x in status.splitlines() if x.startswith("VmHWM:"))
    return int(kilobytes) * 1024


def forget_peak(device: str) -> None:
    """Resets the peak, where the system allows it, after giving freed memory back."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.init()  # a process that has not used it yet has no peak
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _largest() -> int:
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
