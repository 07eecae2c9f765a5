"""An estimate of the memory that a contender's case takes, before it is tried.

Rough on the low side: a case that is refused for its estimate would not have run. It counts
weights (with gradients and AdamW's two moments), the activations kept for the backward pass, scores
of T² where a form holds them, logits of all tokens where a contender makes them, states.
"""

from typing import Any

from retentive.bench.contenders import Choice, Entry
from retentive.devices import resolve_dtype
from retentive.inference.session import SEGMENT
from retentive.models.config import ModelConfig
from retentive.models.counts import mixer_parameters, parameters, state_bytes, weight_bytes

INTEGER = 48  # bytes of a token as int64, and as a number of Python in a list


def needed_bytes(entry: Entry, case: dict[str, Any], choice: Choice) -> int:
    task = case["task"]
    if task in ("op", "step"):
        return _op_bytes(entry, case, choice)
    if task in ("decode", "along"):
        return _decode_bytes(entry, case)
    return _sequence_bytes(entry, case, choice)


def _decode_bytes(entry: Entry, case: dict[str, Any]) -> int:
    config, dtype = entry.config(), resolve_dtype(case["dtype"])
    context = case["context"] if case["task"] == "decode" else max(case["marks"])
    states = case["batch"] * state_bytes(config, context, dtype=dtype)
    if case["device"].startswith("cuda") and entry.contender.settings.get("runner", False):
        states *= 2  # copied into the slots of a recorded step (`retentive.decoding.graphs`)
    weights = weight_bytes(config, dtype)
    if config.quantization is not None:
        weights = weights * config.quantization.bits // (8 * dtype.itemsize)
    return weights + states


def _sequence_bytes(entry: Entry, case: dict[str, Any], choice: Choice) -> int:
    """Of a prompt or a training step."""
    contender, config = entry.contender, entry.config()
    rows, tokens, size = case.get("batch", 1), case["tokens"], resolve_dtype(case["dtype"]).itemsize
    ours, depth = contender.worker == "ours", config.num_hidden_layers
    inputs = rows * tokens * (INTEGER if ours else 8)  # ours reads a list
    if ours and case["task"] == "prefill":
        tokens = min(tokens, SEGMENT)
    scores = _scores(contender.quadratic, choice) * rows * _heads(config) * tokens**2 * size
    activations = rows * tokens * _kept_dims(config) * size
    logits = 2 * rows * tokens * config.vocab_size * size
    if case["task"] == "prefill":
        logits *= contender.worker == "peers"
        return inputs + weight_bytes(config) + activations + scores + logits
    if "retention" not in contender.settings:  # ours keeps no scores for the backward pass
        scores *= depth
    if case.get("checkpoint"):  # a layer at a time, and the inputs of all
        activations = activations // depth + rows * tokens * config.hidden_size * size
    held = 4 if case.get("update", True) else 2
    return held * weight_bytes(config) + depth * activations + scores + (0 if ours else logits)


def _op_bytes(entry: Entry, case: dict[str, Any], choice: Choice) -> int:
    rows, tokens, heads, K, V = (
        case[name] for name in ("batch", "tokens", "heads", "key_dim", "value_dim")
    )
    size, contender = resolve_dtype(case["dtype"]).itemsize, entry.contender
    held = 2 * rows * tokens * heads * (2 * K + 2 * V) * size  # inputs, outputs, gradients
    held += _scores(contender.quadratic, choice) * rows * heads * tokens**2 * size
    if contender.settings.get("retention") == "recurrent":
        held += rows * tokens * heads * K * V * 4
    return held


def _scores(quadratic: bool, choice: Choice) -> int:
    """How many times T² numbers a head and layer holds at once."""
    return 2 if quadratic and not choice.get("chunk_size") else 0


def _heads(config: ModelConfig) -> int:
    """Of a mixer that forms scores; others have none."""
    return getattr(config.mixer, "num_heads", 0)


def _kept_dims(config: ModelConfig) -> int:
    """Numbers a token and layer that enter and leave its matrices."""
    matrices = mixer_parameters(config) + parameters(config)["ffn"]
    return matrices // config.num_hidden_layers // config.hidden_size
