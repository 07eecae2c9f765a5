"""Which runner decodes a model fastest: a program on a CPU, recorded steps on a GPU, or neither."""

import os
import time
from functools import partial

import torch

from retentive.decoding import graphs, program_runner
from retentive.decoding.recurrent import RecurrentRunner, Runner
from retentive.models.language_model import LanguageModel
from retentive.models.state import ModelState

# A forked child has none of its parent's threads, and would wait for them for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


def runner(model: LanguageModel, state: ModelState) -> Runner:
    """The fastest there is for the model. Goes on from `state`, which stays as it is."""
    if state.batch_size and graphs.suits(model):  # a session whose rows have all ended has none
        return graphs.GraphRunner(model, state)
    if program_runner.suits(model):
        return program_runner.ProgramRunner(model, state.clone())
    return RecurrentRunner(model, state.clone())


def fastest_threads(model: LanguageModel, rows: int) -> int:
    """How many CPU threads decode `rows` sequences fastest.

    Small matmuls stop scaling beyond a few threads: tries half as many for as long as that is
    faster, beginning with torch's present number. Logits do not depend on the number where a
    program runs; elsewhere, and for states that grow, it stays as it is.
    """
    allowed = best = torch.get_num_threads()
    if model.device.type != "cpu" or model.state_grows:
        return allowed
    decoding = runner(model, model.init_state(rows))
    tokens = torch.zeros(rows, dtype=torch.int64, device=model.device)
    try:
        fewest = _step_seconds(decoding, tokens)
        while best > 1:
            torch.set_num_threads(best // 2)
            seconds = _step_seconds(decoding, tokens)
            if seconds >= fewest:
                break
            best, fewest = best // 2, seconds
        return best
    finally:
        torch.set_num_threads(allowed)


def _step_seconds(decoding: Runner, tokens: torch.Tensor) -> float:
    """The best of four steps, the first of which warms up."""
    times = []
    for _ in range(4):
        began = time.perf_counter()
        decoding.step(tokens)
        times.append(time.perf_counter() - began)
    return min(times[1:])
