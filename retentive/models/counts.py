"""Parameters, FLOPs and bytes of a model, from its config alone: counted on the meta device.

A multiply-add counts two FLOPs. Embedding look-ups, norms, rotation and activations count nothing.
"""

from dataclasses import replace
from functools import lru_cache

import torch
from torch import nn

from retentive.models.build import shapes
from retentive.models.config import ModelConfig
from retentive.models.language_model import LanguageModel
from retentive.ops.decay import half_life


@lru_cache(maxsize=64)
def _parts(config: ModelConfig) -> dict[str, int]:
    model = _plain(config)
    counts = {"embedding": 0}
    counts |= {block.mixer.name: 0 for block in model.blocks}
    counts |= {"ffn": 0, "norms": 0, "head": 0}
    for name, weight in model.named_parameters():
        counts[_part(model, name)] += weight.numel()
    return counts


def parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by part; their sum is the model's. A tied head has none of its own.

    A hybrid has both kinds of mixer. Norms are those of heads, too.
    """
    return dict(_parts(config))


def _part(model: LanguageModel, name: str) -> str:
    words = name.split(".")
    if words[0] in ("embed_tokens", "lm_head"):
        return "embedding" if words[0] == "embed_tokens" else "head"
    if words[0] != "layers" or "head_norm" in words or words[2].endswith("_norm"):
        return "norms"
    return "ffn" if words[2] == "ffn" else model.blocks[int(words[1])].mixer.name


def _plain(config: ModelConfig) -> LanguageModel:
    """The model before its weights were quantised."""
    return shapes(replace(config, quantization=None))


def mixer_name(config: ModelConfig) -> str:
    """The name of the mixer of most layers, a key of `parameters`."""
    names = [block.mixer.name for block in _plain(config).blocks]
    return max(names, key=names.count)


def mixer_parameters(config: ModelConfig) -> int:
    """Parameters of the mixers of all layers."""
    names = {block.mixer.name for block in _plain(config).blocks}
    return sum(count for part, count in parameters(config).items() if part in names)


def flops_per_token(config: ModelConfig, context: float = 0, *, head: bool = True) -> float:
    """Forward FLOPs of a token that looks at `context` tokens; training takes three times as many.

    For a whole sequence of T tokens the mean context is (T+1)/2. Retention does not depend on it.
    """
    model = _plain(config)
    linear = [part for part in model.layers.modules() if isinstance(part, nn.Linear)]
    weights = sum(layer.weight.numel() for layer in linear)
    if head:
        weights += config.vocab_size * config.hidden_size
    return 2 * weights + sum(block.mixer.mixing_flops(context) for block in model.blocks)


def state_bytes(
    config: ModelConfig, context: int = 0, *, dtype: torch.dtype = torch.float32
) -> int:
    """Of one sequence behind `context` tokens, in a model of `dtype`."""
    return sum(block.mixer.state_bytes(context, dtype) for block in _plain(config).blocks)


def weight_bytes(config: ModelConfig, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of all weights."""
    return sum(parameters(config).values()) * dtype.itemsize


def decode_bytes(
    config: ModelConfig,
    batch: int,
    context: int,
    *,
    dtype: torch.dtype = torch.float32,
    weights: int | None = None,
) -> int:
    """Bytes that a decoding step of `batch` rows has to move, behind `context` tokens of each.

    Every weight is read once, the head included, the embedding table only where it is the head
    (`weights` says how many bytes of them there are where they are not all of `dtype`). A state of
    fixed size is read and written; keys and values are read.
    """
    if weights is None:
        table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        weights = weight_bytes(config, dtype) - table * dtype.itemsize
    mixers = [block.mixer for block in _plain(config).blocks]
    state = sum((1 + m.rewrites_state) * m.state_bytes(context, dtype) for m in mixers)
    return weights + batch * state


def half_lives(config: ModelConfig) -> list[float]:
    """Tokens until the memory of each head of a layer has halved; infinity where nothing decays.

    Empty for mixers without a fixed decay. A hybrid's are those of its first such layer.
    """
    for block in _plain(config).blocks:
        if (decay := block.mixer.log_decay_per_token()) is not None:
            return half_life(decay).tolist()
    return []
