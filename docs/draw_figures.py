"""Draws the figures of docs/retention.md from the package itself: python docs/draw_figures.py"""

from functools import partial
from pathlib import Path

import torch

from retentive import RetNetConfig
from retentive.models.counts import state_bytes
from retentive.models.matching import matching_transformer
from retentive.ops.decay import half_life, log_decay
from retentive.reports import figures

FOLDER = Path(__file__).parent / "figures"
figure = partial(figures.figure, kinds=("png",))


def decay_matrices(
    heads: int = 8, shown: tuple[int, ...] = (0, 2, 4, 7), tokens: int = 128
) -> None:
    """D_nm of four heads: the weight of token m when token n is read."""
    n = torch.arange(tokens)
    distance = (n[:, None] - n[None, :]).double()
    with figure(FOLDER / "decay", size=(10, 3)) as drawn:
        panels = drawn.subplots(1, len(shown), sharey=True)
        for axes, h in zip(panels, shown, strict=True):
            rate = log_decay(heads)[h]
            weights = torch.exp(rate * distance).where(distance >= 0, torch.nan)
            picture = axes.imshow(weights, vmin=0, vmax=1, cmap="viridis")
            axes.set_title(f"head {h}: γ = {rate.exp().item():.4f}", fontsize=12)
            axes.set(xticks=[0, tokens], yticks=[0, tokens], xlabel="token m")
            axes.grid(False)
        panels[0].set_ylabel("token n")
        drawn.colorbar(picture, ax=panels, label="γⁿ⁻ᵐ", pad=0.01, shrink=0.75)


def half_lives(heads: int = 8) -> None:
    """The half-life of every head, under both rules of the paper."""
    rules = [
        ("power", "power: γ = 1 - 2⁻⁵⁻ʰ (§2.2)"),
        ("linspace", "linspace: 1 - γ from 1/32 to 1/512, even in log (§3.1)"),
    ]
    with figure(FOLDER / "half_lives") as drawn:
        axes = drawn.subplots()
        for offset, (rule, label) in zip((-0.2, 0.2), rules, strict=True):
            values = half_life(log_decay(heads, rule))
            bars = axes.bar(torch.arange(heads) + offset, values, 0.38, label=label)
            axes.bar_label(bars, [f"{v:.0f}" for v in values], fontsize=10, padding=2)
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.set(ylim=(10, 6000), xticks=range(heads), xlabel="head", ylabel="half-life, tokens")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
        figures.legend_below(drawn, columns=1)


def memory(size: str = "6.7b") -> None:
    """Bytes that a sequence needs to go on: the state, beside the keys and values of attention."""
    retnet = RetNetConfig.named(size)
    attention = matching_transformer(retnet)
    grouped = matching_transformer(retnet, num_kv_heads=attention.mixer.num_heads // 8)
    lines = [
        (attention, "Transformer, MHA", figures.ORANGE),
        (grouped, "Transformer, GQA 8-fold", figures.BROWN),
        (retnet, "RetNet", figures.BLUE),
    ]
    contexts = [2**n for n in range(7, 18)]
    title = f"Memory of a sequence, {size.upper()}"
    with figure(FOLDER / "memory", title, size=(9, 4.4)) as drawn:
        axes = drawn.subplots()
        for number, (config, label, color) in enumerate(lines):
            gib = [state_bytes(config, n, dtype=torch.bfloat16) / 2**30 for n in contexts]
            axes.plot(contexts, gib, color=color, label=label, marker=figures.MARKERS[number])
        figures.by_doublings(axes, contexts[::2])
        figures.by_decades(axes)
        axes.set(xlabel="tokens read", ylabel="GiB (float32 state, bfloat16 cache)")
        figures.label_ends(axes)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    decay_matrices()
    half_lives()
    memory()
