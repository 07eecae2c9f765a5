"""Decoding one text on and on: what a token costs at each of some marks along the way.

A RetNet really decodes every token. A Transformer's cache is filled with random keys and values
between the marks instead: they cost the same to look at and spare the minutes.
"""

from statistics import median
from typing import Protocol, Self

import torch
from torch import Tensor

from retentive.bench.workers.serving import Answer, Case, Run, Tell, resident_bytes
from retentive.bench.workers.tasks import clock, random_tokens

TIMED = 64  # tokens in front of a mark; its time is their median


class Decoder(Protocol):
    @property
    def state_bytes(self) -> int: ...

    def __call__(self, tokens: Tensor) -> Tensor:
        """A token of each row `[B]` read; the logits of the next, `[B,vocab]`."""
        ...

    def skip(self, count: int) -> bool:
        """Whether `count` tokens need not be decoded: the state now looks as if they had been."""
        ...

    def fork(self) -> Self:
        """Another decoder that goes on from here."""
        ...


def prepare_along(decoder: Decoder, case: Case, tell: Tell) -> tuple[Answer, Run]:
    """Decodes up to each of `case["marks"]`; tells of each what the last tokens before it took.

    The run goes on from the states kept at the marks, if `case["keep_states"]`.
    """
    token, position = random_tokens(case, case["batch"], 1)[:, 0], 0
    # Their memory is taken now: what is held at the marks grows with the text alone.
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
        tell({"mark": measure})
        if case["keep_states"]:
            kept[index] = decoder.fork()

    def run(at: int, times: int) -> Answer:
        _, last = timed_step(kept[at], token, case["device"]), token  # brings the state near again
        seconds = []
        for _ in range(times):
            last, taken = timed_step(kept[at], last, case["device"])
            seconds.append(taken)
        return {"seconds": seconds}

    return {}, run


@torch.inference_mode()
def timed_step(decoder: Decoder, token: Tensor, device: str) -> tuple[Tensor, float]:
    """The greedy choice after `token`, and the seconds it took."""
    began = clock(device)
    following = decoder(token).argmax(-1)
    return following, clock(device) - began
