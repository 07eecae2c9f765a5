"""How much memory a contender's case will take, roughly, known before it is tried.

Rough on the low side: a case that is refused for its estimate would not have run. What is counted:
weights (gradients and AdamW's two moments with them), the activations kept for the backward pass,
scores of T² where a form holds them, logits of all tokens where a contender makes them, states.
"""

from typing import Any

from retentive.bench.contenders import Choice, Entry
from retentive.bench.models import itself
from retentive.devices import resolve_dtype
from retentive.inference.session import SEGMENT
from retentive.models.config import ModelConfig
from retentive.models.counts import mixer_parameters, parameters, state_bytes, weight_bytes

INTEGER = 48  # bytes of a token as int64, and as a number of Python in a list


def needed_bytes(entry: Entry, case: dict[str, Any], choice: Choice) -> int:
    contender, task = entry.contender, case["task"]
    parallel = contender.quadratic and not choice.get("chunk_size")
    size = resolve_dtype(case["dtype"]).itemsize
    if task in ("op", "step"):
        recurrent = contender.settings.get("retention") == "recurrent"
        return _op_bytes(case, size, parallel, recurrent)
    config = entry.config()
    if task in ("decode", "along"):
        context = case["context"] if task == "decode" else max(case["marks"])
        caches = case["batch"] * state_bytes(config, context, dtype=resolve_dtype(case["dtype"]))
        weights = weight_bytes(config, resolve_dtype(case["dtype"]))
        if ours_by_graph(entry, case):
            caches *= 2
        if config.quantization is not None:
            weights = weights * config.quantization.bits // (8 * size)
        return weights + caches
    rows, tokens = case.get("batch", 1), case["tokens"]
    ours = contender.worker == "ours"
    prompt = rows * tokens * (INTEGER if ours else 8)  # ours reads a list
    if ours and task == "prefill":
        tokens = min(tokens, SEGMENT)
    scores = 2 * rows * _heads(config) * tokens**2 * size if parallel else 0
    activations = rows * tokens * _kept_dims(config) * size
    logits = 2 * rows * tokens * config.vocab_size * size
    if task == "prefill":
        logits *= contender.worker == "peers"
        return prompt + weight_bytes(config) + activations + scores + logits
    depth = config.num_hidden_layers
    if contender.equal is not itself or not ours:  # our retention keeps none for the backward pass
        scores *= depth
    if case.get("checkpoint"):  # a layer at a time, and the inputs of all
        activations = activations // depth + rows * tokens * config.hidden_size * size
    held = 4 if case.get("update", True) else 2
    return held * weight_bytes(config) + depth * activations + scores + (0 if ours else logits)


def ours_by_graph(entry: Entry, case: dict[str, Any]) -> bool:
    """Whether states are copied into a recorded step's slots (`retentive.decoding.graphs`)."""
    return case["device"].startswith("cuda") and entry.contender.settings.get("runner", False)


def _op_bytes(case: dict[str, Any], size: int, parallel: bool, recurrent: bool) -> int:
    rows, tokens, heads, K, V = (
        case[name] for name in ("batch", "tokens", "heads", "key_dim", "value_dim")
    )
    inputs_and_outputs = rows * tokens * heads * (2 * K + 2 * V) * size
    held = 2 * inputs_and_outputs  # with their gradients
    if parallel:
        held += 2 * rows * heads * tokens**2 * size
    if recurrent:
        held += rows * tokens * heads * K * V * 4
    return held


def _heads(config: ModelConfig) -> int:
    return getattr(config.mixer, "num_heads", 1)


def _kept_dims(config: ModelConfig) -> int:
    """Numbers a token and layer: what enters and leaves each of its matrices."""
    matrices = mixer_parameters(config) + parameters(config)["ffn"]
    return matrices // config.num_hidden_layers // config.hidden_size
