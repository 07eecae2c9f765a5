"""Small models of every kind, in float64: what must be equal is equal to about 1e-14."""

from typing import Any

import torch

from retentive.mixers.attention import AttentionConfig
from retentive.models.build import build_model
from retentive.models.config import RetNetConfig, TransformerConfig
from retentive.models.language_model import LanguageModel


def retnet(**fields: Any) -> RetNetConfig:
    """A config of flat fields, as config.json has them."""
    return RetNetConfig.from_dict(fields)


def transformer(**fields: Any) -> TransformerConfig:
    return TransformerConfig.from_dict(fields)


SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4}
CONFIGS = {
    "retnet": retnet(**SMALL),
    "retnet-official": retnet(
        **SMALL,
        gated_ffn=True,
        hidden_act="swish",
        norm="rmsnorm",
        head_norm="rmsnorm",
        decay="linspace",
        rotation="rope",
        row_scale=True,
        tie_word_embeddings=True,
        initialization="official",
    ),
    "retnet-ablated": retnet(
        **SMALL, gate=False, head_norm="none", decay=(0.0, 0.0, -0.1, -0.1), row_scale=True
    ),
    "post-norm": retnet(  # as torchscale's and syncdoth's options together
        **SMALL,
        block="post-norm",
        residual_scale=2**0.5,
        final_norm=False,
        embed_scale=32**0.5,
        embed_norm=True,
        norm="rmsnorm",
        head_norm="rmsnorm",
        ffn_bias=True,
        ffn_subln="layernorm",
        row_scale=True,
    ),
    "parallel": retnet(  # as XATL's, and key-value groups
        **SMALL,
        block="parallel",
        hidden_act="gelu_tanh",
        gate_act="gelu",
        head_norm_affine=True,
        rotary_dim=4,
        num_kv_heads=2,
        qkv_bias=True,
        gate_bias=True,
        out_bias=True,
        ffn_bias=True,
        gated_ffn=True,
        head_bias=True,
    ),
    "xpos": retnet(  # as the first of syncdoth's
        **SMALL,
        block="output-norm",
        rotation="rope-across-heads",
        xpos_base=16.0,
        final_norm=False,
        tie_word_embeddings=True,
    ),
    "hybrid": retnet(
        **SMALL,
        attention_layers=(1,),
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, qkv_bias=True, window=4),
    ),
    "transformer": transformer(**SMALL),
    "transformer-gqa": transformer(**SMALL, num_kv_heads=2, gated_ffn=True),
}


def build(name: str, **changes: object) -> LanguageModel:
    """Biases and the weights of norms are random, so that it shows where they act."""
    config = CONFIGS[name]
    config = type(config).from_dict({**config.to_dict(), **changes})
    model = build_model(config)
    model.init_weights(seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return model.double()
