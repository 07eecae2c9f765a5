"""syncdoth's RetNet (github.com/syncdoth/RetNet), version 2: torchscale's decoder as a Hugging Face
model, with some options more.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retentive.convert.activations import TORCHSCALE_NAMES, activation
from retentive.convert.dialect import Checkpoint, Dialect, TheirConfig, Weight, find_key
from retentive.convert.dialects import torchscale
from retentive.convert.source import Source
from retentive.models.config import RetNetConfig


@dataclass(frozen=True)
class SyncdothConfig(TheirConfig):
    vocab_size: int
    decoder_embed_dim: int
    decoder_value_embed_dim: int
    decoder_retention_heads: int
    decoder_ffn_embed_dim: int
    decoder_layers: int
    decoder_normalize_before: bool = True
    activation_fn: str = "gelu"
    no_scale_embedding: bool = True
    layernorm_embedding: bool = False
    layernorm_eps: float = 1e-6
    deepnorm: bool = False
    subln: bool = True
    use_glu: bool = True
    use_ffn_rms_norm: bool = False
    use_lm_decay: bool = False
    tie_word_embeddings: bool = False

    def to_ours(self, checkpoint: Checkpoint) -> dict[str, Any]:
        pre_norm = self.decoder_normalize_before and not self.deepnorm
        plain = not self.use_glu
        subln = "rmsnorm" if self.use_ffn_rms_norm else "layernorm"
        return torchscale.decoder_fields(
            vocab_size=self.vocab_size,
            width=self.decoder_embed_dim,
            layers=self.decoder_layers,
            deepnorm=self.deepnorm,
            scale_embedding=not self.no_scale_embedding,
            eps=self.layernorm_eps,
        ) | {
            "num_heads": self.decoder_retention_heads,
            "value_dim": self.decoder_value_embed_dim,
            "intermediate_size": self.decoder_ffn_embed_dim,
            "hidden_act": activation("activation_fn", self.activation_fn, TORCHSCALE_NAMES),
            "gated_ffn": self.use_glu,
            "ffn_bias": plain,
            "ffn_subln": subln if plain and self.subln and not self.deepnorm else "none",
            "decay": "linspace" if self.use_lm_decay else "power",
            "block": "pre-norm" if pre_norm else "post-norm",
            "final_norm": pre_norm,
            "embed_norm": self.layernorm_embedding,
            "tie_word_embeddings": self.tie_word_embeddings,
        }


def decay(config: RetNetConfig) -> Tensor:
    """log γ `[H]`."""
    if config.mixer.decay == "power":
        return torchscale.decay(config)
    exponents = torch.linspace(math.log(1 / 32), math.log(1 / 512), config.mixer.num_heads)
    return (1 - exponents.exp()).log()


def evidence(source: Source) -> str | None:
    return find_key(source.tensors, "model.layers.", ".retention.q_proj.weight")


SYNCDOTH = Dialect(
    "syncdoth",
    "syncdoth's RetNet, version 2",
    SyncdothConfig,
    (*torchscale.decoder("model."), Weight("lm_head.weight", "lm_head.weight")),
    evidence,
    torchscale.positions("model.", decay),
)
