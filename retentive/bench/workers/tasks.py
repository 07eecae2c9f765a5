"""The timed tasks, for language models and ops of whatever package: a step, a prompt, a token.

Shapes: B rows, T tokens; tokens `[B,T]`, logits `[B,vocab]`.
"""

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from retentive.bench.workers.serving import Answer, Case, Run, flush_buffer, forget_peak

Step = Callable[[Tensor], Tensor]
"""Reads a token of each row `[B]` and gives the logits of the next, `[B,vocab]`."""


class Model(Protocol):
    """A contender's model. Only the methods of the task at hand are called."""

    facts: dict[str, Any]
    """version, parameters, form"""

    def parameters(self) -> Iterable[Tensor]: ...
    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean cross entropy of `[B,T]`, for `backward`."""
        ...

    def read(self, tokens: Tensor) -> object:
        """Reads a prompt `[1,T]`, up to the state from which decoding goes on."""
        ...

    def decoder(self, batch: int, context: int) -> Step:
        """Decodes behind `context` tokens of each row."""
        ...


def prepare(model: Model, case: Case) -> tuple[Answer, Run]:
    """The model's facts, and the run of `case["task"]`, which has been run once."""
    run = {"train": train, "prefill": prefill, "decode": decode}[case["task"]](model, case)
    run()
    return {**model.facts, "dtype": case["dtype"]}, run


def clock(device: str) -> float:
    """The time at which all work of the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


class Stopwatch:
    """Times of laps, from its making on.

    On a GPU by events in its queue: Python's time between two launches counts only where the GPU
    had to wait for it.
    """

    def __init__(self, device: str):
        self._device, self._moments = device, []
        self._on_gpu = device.startswith("cuda")
        self.lap()

    def lap(self) -> None:
        if not self._on_gpu:
            self._moments.append(clock(self._device))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._moments.append(event)

    def seconds(self) -> list[float]:
        """Of each lap."""
        if not self._on_gpu:
            return [end - begin for begin, end in pairwise(self._moments)]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in pairwise(self._moments)]


def empty_caches(device: str) -> None:
    """Overwrites the GPU's L2 cache, which else would hold data of the run before.

    It takes the GPU longer than Python needs for the next launches, so that these run back to back.
    """
    if device.startswith("cuda"):
        flush_buffer(device).zero_()


def random_tokens(case: Case, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    vocab_size = case["config"]["vocab_size"]
    return torch.randint(0, vocab_size, shape, generator=generator).to(case["device"])


def train(model: Model, case: Case) -> Run:
    """Forward, backward and AdamW's update of one batch; float32 weights whatever the dtype.

    Without `case["update"]` the gradients are computed and dropped.
    """
    device, tokens = case["device"], random_tokens(case, case["batch"], case["tokens"] + 1)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    parameters = list(model.parameters())
    optimizer = None
    if case.get("update", True):
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    mixed = case["dtype"] == "bfloat16"

    def run() -> Answer:
        began = clock(device)
        with torch.autocast(device.partition(":")[0], torch.bfloat16) if mixed else nullcontext():
            loss = model.loss(inputs, targets)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        return {"seconds": [clock(device) - began]}

    return run


def prefill(model: Model, case: Case) -> Run:
    device, tokens = case["device"], random_tokens(case, 1, case["tokens"])

    @torch.inference_mode()
    def run() -> Answer:
        began = clock(device)
        model.read(tokens)
        return {"seconds": [clock(device) - began]}

    return run


def decode(model: Model, case: Case) -> Run:
    """Greedy: the next token is the likeliest, the least that decoding has to compute."""
    device, token = case["device"], random_tokens(case, case["batch"], 1)[:, 0]
    with torch.inference_mode():
        step = model.decoder(case["batch"], case["context"])
    forget_peak(device)  # of reading the context, which `prefill` measures

    @torch.inference_mode()
    def run(seconds: float = 0.0, most: int = 32) -> Answer:
        """Tokens for as long as `seconds`, at least three and at most `most`."""
        nonlocal token
        began, watch, count = clock(device), Stopwatch(device), 0
        while count < 3 or (time.perf_counter() - began < seconds and count < most):
            token = step(token).argmax(-1)
            watch.lap()
            count += 1
        return {"seconds": watch.seconds()}

    return run


def op_inputs(case: Case, layout: str) -> list[Tensor]:
    """q, k `[B,T,H,K]` and v `[B,T,H,V]`, or `[B,H,T,...]` for the layout "heads first"."""
    rows, tokens, heads = case["batch"], case["tokens"], case["heads"]
    shape = (rows, heads, tokens) if layout == "heads first" else (rows, tokens, heads)
    dims = (case["key_dim"], case["key_dim"], case["value_dim"])
    kind: dict[str, Any] = {"device": case["device"], "dtype": getattr(torch, case["dtype"])}
    return [torch.randn(*shape, dim, **kind).requires_grad_() for dim in dims]


def op_run(forward: Callable[[], Tensor], leaves: list[Tensor], device: str) -> Run:
    """Forward and backward of an op, timed apart and together; run once to warm up."""
    gradient = torch.randn_like(forward())

    def once() -> list[float]:
        for leaf in leaves:
            leaf.grad = None
        empty_caches(device)
        watch = Stopwatch(device)
        o = forward()
        watch.lap()
        o.backward(gradient)
        watch.lap()
        return watch.seconds()

    def run(times: int = 1, seconds: float = float("inf")) -> Answer:
        """At least once, for as long as `seconds`, at most `times`."""
        parts = [once()]
        while len(parts) < times and sum(map(sum, parts)) < seconds:
            parts.append(once())
        return {"seconds": [sum(part) for part in parts], "forward": [part[0] for part in parts]}

    run()
    return run


def step_run(step: Callable[[], object], device: str) -> Run:
    """A decoding step of an op; run once to warm up."""

    @torch.inference_mode()
    def once() -> float:
        empty_caches(device)
        watch = Stopwatch(device)
        step()
        watch.lap()
        return watch.seconds()[0]

    def run(times: int = 20) -> Answer:
        return {"seconds": [once() for _ in range(times)]}

    run(3)
    return run
