"""Draws the figures of docs/retention.md from the package itself: python docs/draw_figures.py"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from retentive import RetNetConfig, TransformerConfig
from retentive.models.counts import state_bytes
from retentive.ops.decay import half_life, log_decay

FOLDER = Path(__file__).parent / "figures"
plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})


def decay_matrices(
    heads: int = 8, shown: tuple[int, ...] = (0, 2, 4, 7), tokens: int = 128
) -> None:
    """D_nm of four heads: how much of token m a head still sees at token n."""
    n = torch.arange(tokens)
    distance = (n[:, None] - n[None, :]).clamp(min=0)
    figure, axes = plt.subplots(1, len(shown), figsize=(10, 2.9), layout="constrained")
    for axis, h in zip(axes, shown, strict=True):
        rate = log_decay(heads)[h]
        matrix = torch.exp(rate * distance).tril()
        picture = axis.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
        axis.set_title(f"head {h}: γ = {rate.exp().item():.4f}", fontsize=10)
        axis.set_xlabel("token m, read")
        axis.set_xticks([0, tokens])
        axis.set_yticks([0, tokens])
    axes[0].set_ylabel("token n, reading")
    figure.colorbar(picture, ax=axes, label="γ^(n-m)", fraction=0.02)
    figure.savefig(FOLDER / "decay.png", dpi=120)


def half_lives(heads: int = 8) -> None:
    """The half-life of every head, under both rules of the paper."""
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    rules = [
        ("power", "γ = 1 - 2^(-5-h)  (§2.2)"),
        ("linspace", "1/32 to 1/512, even in log  (§3.1)"),
    ]
    for offset, (rule, label) in zip((-0.2, 0.2), rules, strict=True):
        values = half_life(log_decay(heads, rule))
        bars = axis.bar(torch.arange(heads) + offset, values, 0.38, label=label)
        axis.bar_label(bars, [f"{v:.0f}" for v in values], fontsize=8, padding=2)
    axis.set_yscale("log")
    axis.set_ylim(10, 6000)
    axis.set_xticks(range(heads))
    axis.set_xlabel("head")
    axis.set_ylabel("half-life in tokens")
    axis.legend(frameon=False, loc="upper left")
    figure.savefig(FOLDER / "half_lives.png", dpi=120)


def memory(size: str = "6.7b") -> None:
    """Bytes that a sequence needs to go on: the state, beside the keys and values of attention."""
    retnet = RetNetConfig.named(size)
    contexts = [2**n for n in range(7, 18)]
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    attention = TransformerConfig.matching(retnet)
    grouped = TransformerConfig.matching(retnet, num_kv_heads=attention.num_heads // 8)
    lines = [
        (attention, "Transformer, keys and values of all heads", "C3"),
        (grouped, "Transformer, 8 heads to a key and value", "C1"),
        (retnet, "RetNet, the state", "C0"),
    ]
    for config, label, color in lines:
        sizes = [state_bytes(config, context, dtype=torch.bfloat16) / 2**20 for context in contexts]
        axis.plot(contexts, sizes, color=color, label=label, marker=".")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(
        contexts[::2], [f"{c // 1024}k" if c >= 1024 else str(c) for c in contexts[::2]]
    )
    axis.set_xlabel("tokens read")
    axis.set_ylabel("MiB a sequence")
    axis.set_title(f"{size.upper()}: bfloat16 cache, float32 state", fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(FOLDER / "memory.png", dpi=120)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    decay_matrices()
    half_lives()
    memory()
