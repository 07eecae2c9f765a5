"""How much memory a contender's case will take, roughly, known before it is tried.

Rough on the low side: a case that is refused for its estimate would not have run. What is counted:
weights (gradients and AdamW's two moments with them), the activations kept for the backward pass,
scores of T² where a form holds them, logits of all tokens where a contender makes them, states.
"""

from typing import Any

import torch

from retentive.bench.contenders import Choice, Entry
from retentive.devices import resolve_dtype
from retentive.models.config import RetNetConfig, TransformerConfig
from retentive.models.counts import mixer_name, parameters, state_bytes, weight_bytes


def needed_bytes(entry: Entry, case: dict[str, Any], choice: Choice) -> int:
    contender, task = entry.contender, case["task"]
    parallel = contender.quadratic and not choice.get("chunk_size")
    size = resolve_dtype(case["dtype"]).itemsize
    if task == "op":
        recurrent = contender.settings.get("retention") == "recurrent"
        return _op_bytes(case, size, parallel, recurrent)
    config = entry.config()
    if task in ("decode", "along"):
        context = case["context"] if task == "decode" else max(case["marks"])
        caches = case["batch"] * state_bytes(config, context, dtype=resolve_dtype(case["dtype"]))
        weights = weight_bytes(config, resolve_dtype(case["dtype"]))
        if config.quantization is not None:
            weights = weights * config.quantization.bits // (8 * size)
        return weights + caches
    tokens = case["tokens"] * case.get("batch", 1)
    scores = case.get("batch", 1) * config.num_heads * case["tokens"] ** 2 * size if parallel else 0
    whole_logits = 0 if contender.worker == "ours" else tokens * config.vocab_size * size
    if task == "prefill":
        held = min(tokens, 2048) if contender.worker == "ours" else tokens
        last_only = contender.worker != "peers"
        logits = 0 if last_only else whole_logits
        return weight_bytes(config) + held * _kept_dims(config) * size + 2 * scores + logits
    kept = config.num_hidden_layers * tokens * _kept_dims(config) * size
    scores *= config.num_hidden_layers
    return 4 * weight_bytes(config, torch.float32) + kept + scores + 2 * whole_logits


def _op_bytes(case: dict[str, Any], size: int, parallel: bool, recurrent: bool) -> int:
    tokens, heads, K, V = (case[k] for k in ("tokens", "heads", "key_dim", "value_dim"))
    held = 2 * tokens * heads * (2 * K + 2 * V) * size  # inputs and outputs with their gradients
    if parallel:
        held += 2 * heads * tokens**2 * size
    if recurrent:
        held += tokens * heads * K * V * 4
    return held


def _kept_dims(config: RetNetConfig | TransformerConfig) -> int:
    """Numbers a token and layer: what enters and leaves each of its matrices."""
    counted = parameters(config)
    matrices = counted[mixer_name(config)] + counted["ffn"]
    return matrices // config.num_hidden_layers // config.hidden_size
