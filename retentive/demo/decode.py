"""Time and memory of a token at growing contexts, each contender measured in a process of its own.

RetNet really decodes every token. The Transformer's cache is filled with random keys and values up
to each position instead, which costs the same to look at and spares the minutes in between.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from retentive.errors import InputError
from retentive.models.checkpoint import load
from retentive.models.config import TransformerConfig
from retentive.models.counts import state_bytes
from retentive.models.kv_cache import KVCache
from retentive.models.retnet import RetNet
from retentive.models.state import RetNetState
from retentive.models.transformer import Transformer

CONTENDERS = ("RetNet", "Transformer")
TIMED = 64  # tokens; a position's time is their median


@dataclass(frozen=True)
class Measure:
    """At `position` tokens: seconds a token, bytes of state in use, bytes of the process in RAM."""

    position: int
    seconds: float
    state: int
    resident: int


def positions(tokens: int) -> list[int]:
    """Where to measure: 32 steps to `tokens`, and the start."""
    step = max(TIMED, tokens // 32)
    return [TIMED, *range(max(step, 2 * TIMED), tokens + 1, step)]


def measure(
    contender: str, folder: Path, tokens: int, advance: Callable[[int], None]
) -> list[Measure]:
    """Measures a contender in a new process; `advance` hears of each position it has reached.

    Raises InputError where `folder` holds no RetNet that can be loaded.
    """
    command = [sys.executable, "-m", "retentive.demo.decode", contender, str(folder), str(tokens)]
    measures = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                told = json.loads(line)
                if "mistake" in told:
                    raise InputError(told["mistake"])
                measures.append(Measure(**told))
                advance(measures[-1].position)
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return measures


def contender_model(contender: str, folder: Path) -> RetNet | Transformer:
    """The trained RetNet, or a Transformer of as many parameters; untrained, it is as fast."""
    retnet = load(folder)  # by both, so that both processes begin with the same libraries
    if not isinstance(retnet, RetNet):
        raise InputError(f"{folder} holds no RetNet; give a RetNet's model folder")
    if contender == "RetNet":
        return retnet
    return Transformer(TransformerConfig.matching(retnet.config)).eval()


@torch.inference_mode()
def decode(model: RetNet | Transformer, tokens: int) -> Iterator[Measure]:
    """Greedy decoding from the end token on, measured at `positions(tokens)`."""
    state = start(model, tokens)
    token = torch.zeros(1, 1, dtype=torch.int64)
    position = 0
    for target in positions(tokens):
        if isinstance(model, Transformer):
            state = filled(model, state, target - TIMED - position)
            position = target - TIMED
        seconds = []
        while position < target:
            began = time.perf_counter()
            hidden, state = model.hidden(token, state)
            token = model.head(hidden).argmax(-1)
            seconds.append(time.perf_counter() - began)
            position += 1
            assert state is not None
        in_use = state_bytes(model.config, position)
        yield Measure(target, median(seconds[-TIMED:]), in_use, resident_bytes())


def start(model: RetNet | Transformer, tokens: int) -> RetNetState:
    """The state before the first token, with room for `tokens` keys and values where there are any.

    The room is not touched before it is used: the process holds what the text needs, not more.
    """
    state = model.init_state(1)
    if isinstance(model, RetNet):
        return state
    room = (1, model.config.kv_heads, tokens, model.config.head_dim)
    caches = [KVCache.of((torch.empty(room), torch.empty(room)), (0,)) for _ in state.layers]
    return RetNetState(state.positions, caches)


def filled(model: Transformer, state: RetNetState, count: int) -> RetNetState:
    """`count` more tokens in a Transformer's caches."""
    shape = (1, model.config.kv_heads, count, model.config.head_dim)
    caches = [cache.append((torch.randn(shape), torch.randn(shape))) for cache in state.layers]
    return RetNetState(state.positions + count, caches)


def resident_bytes() -> int:
    """Memory of this process that is in RAM; where the system does not say, its largest so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except FileNotFoundError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    import os

    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    contender, folder, tokens = sys.argv[1:]
    try:
        for at in decode(contender_model(contender, Path(folder)), int(tokens)):
            print(json.dumps(asdict(at)), flush=True)
    except InputError as error:
        print(json.dumps({"mistake": str(error)}), flush=True)
    except KeyboardInterrupt:  # the demo's own process says so
        sys.exit(130)


if __name__ == "__main__":
    main()
