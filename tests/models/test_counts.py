"""Counts against models that exist, torch's own counter and sums done by hand."""

import pytest
import torch
import zoo
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from retentive.mixers.attention import AttentionConfig
from retentive.models import counts
from retentive.models.build import shapes
from retentive.models.config import ModelConfig, RetNetConfig
from retentive.models.matching import matching_transformer


def mixing_flops(config: ModelConfig, context: float, layer: int = 0) -> float:
    return shapes(config).blocks[layer].mixer.mixing_flops(context)


def test_parameters_are_the_models(model) -> None:
    parts = counts.parameters(model.config)
    assert sum(parts.values()) == model.num_parameters()
    named = dict(model.named_parameters())
    assert parts["embedding"] == named["embed_tokens.weight"].numel()
    assert parts["ffn"] == sum(x.numel() for name, x in named.items() if ".ffn." in name)
    assert parts["norms"] == sum(x.numel() for name, x in named.items() if "norm" in name)
    assert counts.weight_bytes(model.config) == 4 * model.num_parameters()
    assert counts.weight_bytes(model.config, torch.bfloat16) == 2 * model.num_parameters()


def test_flops_of_the_products_are_those_run(model, tokens: Tensor) -> None:
    """torch counts linear layers and attention; custom operators it does not know."""
    config, count = model.config, tokens.shape[1]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens[:1])
    run = counter.get_flop_counts()["Global"]
    products = sum(flops for op, flops in run.items() if str(op) in ("aten.mm", "aten.addmm"))
    mixing = sum(mixing_flops(config, 5, layer) for layer in range(len(model.layers)))
    assert products == count * (counts.flops_per_token(config, 5) - mixing)
    headless = counts.flops_per_token(config, 5, head=False)
    head = 2 * config.vocab_size * config.hidden_size
    assert counts.flops_per_token(config, 5) - headless == head


def test_flops_by_hand() -> None:
    retnet = zoo.retnet(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_heads=2)
    # K 32, V 64: two products with 64 keys, two with the state; heads and layers times that.
    mixing = 2 * (2 * 64 * (32 + 64) + 4 * 32 * 64)
    assert mixing_flops(retnet, 7) == mixing_flops(retnet, 7000) == mixing
    assert counts.flops_per_token(retnet) == 2 * (2 * 12 * 64**2 + 100 * 64) + 2 * mixing
    transformer = zoo.transformer(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_heads=4, num_kv_heads=1
    )
    # q·k and p·v with 1000 keys for 64 dims of heads, whoever shares the keys.
    assert mixing_flops(transformer, 1000) == 2 * 2 * 1000 * 64
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 16 + 2 * 64 * 256) + 100 * 64
    assert counts.flops_per_token(transformer, 1000) == 2 * weights + 2 * 2 * 2 * 1000 * 64


def test_state_bytes_are_the_states(model, tokens: Tensor) -> None:
    with torch.no_grad():
        _, state = model.float()(tokens[:1])
    context = tokens.shape[1]
    assert counts.state_bytes(model.config, context) == state.nbytes
    half = counts.state_bytes(model.config, context, dtype=torch.bfloat16)
    retention = sum(layer.nbytes for layer in state.layers if layer.kind == "retention")
    assert 2 * (half - retention) == state.nbytes - retention


def test_a_window_bounds_what_attention_costs() -> None:
    attention = AttentionConfig(num_heads=2, window=100)
    hybrid = zoo.retnet(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=3,
        num_heads=2,
        attention_layers=(1,),
        attention=attention,
    )
    assert mixing_flops(hybrid, 5, 1) == 4 * 5 * 64
    assert mixing_flops(hybrid, 10**6, 1) == 4 * 100 * 64
    state = 2 * 2 * 32 * 64  # layers, heads, K, V
    assert counts.state_bytes(hybrid, 10**6) == 4 * (state + 2 * 99 * 64)
    step = counts.decode_bytes(hybrid, 3, 10**6) - counts.decode_bytes(hybrid, 0, 0)
    assert step == 3 * 4 * (2 * state + 2 * 99 * 64)
    baseline = matching_transformer(hybrid)
    given, wanted = (sum(counts.parameters(c).values()) for c in (baseline, hybrid))
    assert given == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("size", ["1.3b", "6.7b"])
def test_parts_of_the_papers_sizes(size: str) -> None:
    config = RetNetConfig.named(size)
    width, depth = config.hidden_size, config.num_hidden_layers
    parts = counts.parameters(config)
    assert parts["retention"] == 8 * depth * width**2
    assert parts["ffn"] == 4 * depth * width**2


def test_bytes_of_a_decoding_step_by_hand() -> None:
    retnet = zoo.retnet(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_heads=2)
    # 12 D² a layer and the head; two LayerNorms a layer and one at the end; the table is not read.
    weights = 2 * 12 * 64**2 + 100 * 64 + 5 * 2 * 64
    state = 2 * 2 * 32 * 64  # layers, heads, K, V: read and written for each row
    assert counts.decode_bytes(retnet, 3, 7) == 4 * (weights + 3 * 2 * state)
    half = counts.decode_bytes(retnet, 3, 7, dtype=torch.bfloat16)
    assert half == 2 * weights + 4 * 3 * 2 * state  # the state stays float32
    assert counts.decode_bytes(retnet, 3, 7, weights=1000) == 1000 + 4 * 3 * 2 * state
    tied = zoo.retnet(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_heads=2, tie_word_embeddings=True
    )
    assert counts.decode_bytes(tied, 3, 7) == counts.decode_bytes(retnet, 3, 7)
    transformer = zoo.transformer(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_heads=4, num_kv_heads=1
    )
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 16 + 2 * 64 * 256) + 100 * 64 + 5 * 2 * 64
    cache = 2 * 2 * 1000 * 16  # layers, keys and values, tokens, dims: read
    assert counts.decode_bytes(transformer, 3, 1000) == 4 * (weights + 3 * cache)
