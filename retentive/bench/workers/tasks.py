"""What is timed of a language model, whoever wrote it: a training step, a prompt, a token.

Shapes: B rows, T tokens; tokens `[B,T]`, logits `[B,vocab]`.
"""

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from retentive.bench.workers.serving import Answer, Case, Run, forget_peak

Step = Callable[[Tensor], Tensor]
"""Reads a token of each row `[B]`, goes on to the logits of the next, `[B,vocab]`."""


class Model(Protocol):
    """A contender's model. A method is called only for the task that needs it."""

    facts: dict[str, Any]
    """version, parameters, form"""

    def parameters(self) -> Iterable[Tensor]: ...
    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean cross entropy of `[B,T]`, to be differentiated."""
        ...

    def read(self, tokens: Tensor) -> object:
        """Reads a prompt `[1,T]`, to the state that decoding would go on from."""
        ...

    def decoder(self, batch: int, context: int) -> Step:
        """Decoding behind `context` tokens of each row."""
        ...


def prepare(model: Model, case: Case) -> tuple[Answer, Run]:
    """The model's facts, and the run of `case["task"]`, warmed up."""
    run = {"train": train, "prefill": prefill, "decode": decode}[case["task"]](model, case)
    run()
    return {**model.facts, "dtype": case["dtype"]}, run


def clock(device: str) -> float:
    """Now, with all that was asked of the device done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def random_tokens(case: Case, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    vocab_size = case["config"]["vocab_size"]
    return torch.randint(0, vocab_size, shape, generator=generator).to(case["device"])


def train(model: Model, case: Case) -> Run:
    """Forward, backward and AdamW's update of one batch; float32 weights whatever the dtype."""
    device, tokens = case["device"], random_tokens(case, case["batch"], case["tokens"] + 1)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    low = case["dtype"] == "bfloat16"

    def run() -> Answer:
        began = clock(device)
        with torch.autocast(device.partition(":")[0], torch.bfloat16) if low else nullcontext():
            loss = model.loss(inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
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
    """Greedy: the next token is chosen from the logits, as every decoding does at least."""
    device, token = case["device"], random_tokens(case, case["batch"], 1)[:, 0]
    with torch.inference_mode():
        step = model.decoder(case["batch"], case["context"])
    forget_peak(device)  # the memory of decoding; that of reading the context is prefill's

    @torch.inference_mode()
    def run(seconds: float = 0.0, most: int = 32) -> Answer:
        """Tokens of each row for as long as `seconds`, at least three."""
        nonlocal token
        times: list[float] = []
        while len(times) < 3 or (sum(times) < seconds and len(times) < most):
            began = clock(device)
            token = step(token).argmax(-1)
            times.append(clock(device) - began)
        return {"seconds": times}

    return run


def op_inputs(case: Case, layout: str) -> list[Tensor]:
    """q, k `[1,T,H,K]` and v `[1,T,H,V]`, or `[1,H,T,...]` for the layout "heads first"."""
    tokens, heads = case["tokens"], case["heads"]
    shape = (1, heads, tokens) if layout == "heads first" else (1, tokens, heads)
    dims = (case["key_dim"], case["key_dim"], case["value_dim"])
    kind: dict[str, Any] = {"device": case["device"], "dtype": getattr(torch, case["dtype"])}
    return [torch.randn(*shape, dim, **kind).requires_grad_() for dim in dims]


def op_run(forward: Callable[[], Tensor], leaves: list[Tensor], device: str) -> Run:
    """Forward and backward of an op, timed apart and together; run once to warm up."""
    gradient = torch.randn_like(forward())

    def run() -> Answer:
        for leaf in leaves:
            leaf.grad = None
        start = clock(device)
        o = forward()
        middle = clock(device)
        o.backward(gradient)
        end = clock(device)
        return {"seconds": [end - start], "forward": [middle - start]}

    run()
    return run
