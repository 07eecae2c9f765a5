"""Decoding one long sequence: the cost of a token at each of some marks along it.

A model with a state decodes every token. A Transformer's cache is filled with random keys and
values between the marks instead: they cost the same to read and spare the minutes.
"""

from statistics import median
from typing import Protocol, Self

import torch
from torch import Tensor

from retentive.bench.workers.serving import Answer, Case, Run, Send, resident_bytes
from retentive.bench.workers.tasks import clock, random_tokens

TIMED = 64  # tokens before a mark, whose time is their median


class Decoder(Protocol):
    @property
    def state_bytes(self) -> int: ...

    def __call__(self, tokens: Tensor) -> Tensor:
        """Reads a token of each row `[B]`; gives the logits of the next, `[B,vocab]`."""
        ...

    def skip(self, count: int) -> bool:
        """Puts the state where decoding `count` tokens would; False if they must be decoded."""
        ...

    def fork(self) -> Self:
        """An independent copy in the same state."""
        ...


def prepare_along(decoder: Decoder, case: Case, send: Send) -> tuple[Answer, Run]:
    """Decodes up to each of `case["marks"]`; sends the time of the last tokens before each.

    The run goes on from the states kept at the marks, if `case["keep_states"]`.
    """
    token, position = random_tokens(case, case["batch"], 1)[:, 0], 0
    # Allocated now, so that memory at the marks grows with the sequence alone
    kept = [decoder.fork() for _ in case["marks"]] if case["keep_states"] else []
    for index, mark in enumerate(case["marks"]):
        if decoder.skip(mark - TIMED - position):
            position = mark - TIMED
        seconds: list[float] = []
        while position < mark:
            token, taken = timed_step(decoder, token, case["device"])
            seconds.append(taken)
            position += 1
        measure = {
            "position": mark,
            "seconds": median(seconds[-TIMED:]),
            "state": decoder.state_bytes,
            "resident": resident_bytes(case["device"]),
        }
        send({"message": measure})
        if case["keep_states"]:
            kept[index] = decoder.fork()

    def run(at: int, times: int) -> Answer:
        _, last = timed_step(kept[at], token, case["device"]), token  # brings the state into caches
        seconds = []
        for _ in range(times):
            last, taken = timed_step(kept[at], last, case["device"])
            seconds.append(taken)
        return {"seconds": seconds}

    return {}, run


@torch.inference_mode()
def timed_step(decoder: Decoder, token: Tensor, device: str) -> tuple[Tensor, float]:
    """The likeliest token after `token`, and the seconds of the step."""
    began = clock(device)
    following = decoder(token).argmax(-1)
    return following, clock(device) - began
