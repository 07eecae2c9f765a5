"""The plan of `retentive bench quality`: its sizes, variants and runs.

All variants of a size have equally many parameters and see the same tokens; runs of the same seed
see them in the same order.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal

from retentive.bench.models import count
from retentive.data.dataset import DataConfig
from retentive.models.config import RetNetConfig
from retentive.models.matching import match_parameters
from retentive.train.config import ModelOptions, OptimizerConfig, RunConfig, TrainConfig


@dataclass(frozen=True)
class Recipe:
    """A size: the RetNet that the variants are changes of, and the training that all share."""

    model: Mapping[str, Any]
    vocab_size: int
    """The most that the tokenizer may have."""
    tokens: int
    batch_size: int
    seq_len: int
    learning_rates: tuple[float, ...]
    warmup: float = 0.1
    """A part of the steps."""
    clip: float = 1.0

    def digest(self) -> str:
        """A digest of all that runs in one folder must share, without the defaults of options."""
        facts = asdict(replace(self, tokens=0, learning_rates=()))
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


# The decays of the paper's language models (§3.1). The row scale is its second normalization of the
# scores (§2.1): a head norm undoes it, so that it matters for the variant without one only.
_LAYER = {"decay": "linspace", "row_scale": True, "tie_word_embeddings": True}

SIZES = {
    "3m": Recipe(
        {"hidden_size": 192, "num_hidden_layers": 5, "num_heads": 3, **_LAYER},
        vocab_size=4096,
        tokens=2_048_000,
        batch_size=4,
        seq_len=512,
        learning_rates=(2e-3, 4e-3, 8e-3, 1.6e-2),
    ),
    "20m": Recipe(
        {"hidden_size": 384, "num_hidden_layers": 10, "num_heads": 6, **_LAYER},
        vocab_size=8192,
        tokens=100_000_000,
        batch_size=16,
        seq_len=1024,
        learning_rates=(1e-3, 2e-3, 4e-3),
    ),
    "50m": Recipe(
        {"hidden_size": 512, "num_hidden_layers": 14, "num_heads": 8, **_LAYER},
        vocab_size=8192,
        tokens=250_000_000,
        batch_size=32,
        seq_len=1024,
        learning_rates=(5e-4, 1e-3, 2e-3),
    ),
}


@dataclass(frozen=True)
class Variant:
    label: str
    changes: Callable[[RetNetConfig], dict[str, Any]] = lambda retnet: {}
    """The fields that differ from the RetNet's."""
    kind: Literal["retnet", "transformer"] = "retnet"


VARIANTS = {  # the names and numbers of the paper's §3.5 and Table 6
    "retnet": Variant("RetNet"),
    "no-gate": Variant("no swish gate", lambda retnet: {"gate": False}),
    "no-head-norm": Variant("no head norm", lambda retnet: {"head_norm": "none"}),
    "no-decay": Variant("no decay", lambda retnet: {"decay": (0.0,) * retnet.mixer.num_heads}),
    "one-decay": Variant(
        "one decay for all",
        lambda retnet: {"decay": (math.log(127 / 128),) * retnet.mixer.num_heads},
    ),
    "small-heads": Variant(
        "smaller heads, 1/4", lambda retnet: {"num_heads": 4 * retnet.mixer.num_heads}
    ),
    "transformer": Variant("Transformer", kind="transformer"),
}


def model_options(recipe: Recipe, name: str) -> ModelOptions:
    """A variant's [model], with the FFN that makes its number of parameters the RetNet's."""
    variant = VARIANTS[name]
    if variant.kind == "transformer":  # `ModelOptions` matches it to the RetNet
        return ModelOptions(kind="transformer", fields=recipe.model)
    retnet = RetNetConfig.from_dict({"vocab_size": 1, **recipe.model})
    changes = variant.changes(retnet)
    changed = RetNetConfig.from_dict({"vocab_size": 1, **recipe.model, **changes})
    matched = match_parameters(changed, count(retnet), multiple=1)
    width = {"intermediate_size": matched.ffn_dim}
    return ModelOptions(fields={**recipe.model, **changes, **width})


@dataclass(frozen=True)
class Job:
    """One run."""

    variant: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant}-lr{self.lr:g}-seed{self.seed}"

    def __str__(self) -> str:
        return f"{VARIANTS[self.variant].label}, learning rate {self.lr:g}, seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """The result of a run, over all held-out documents."""

    valid_loss: float | None = None
    """Nats a token, of rows as in training, each from an empty state. None if it diverged."""
    bits_per_byte: float | None = None
    carried_loss: float | None = None
    """Nats a token where the state is carried from row to row. None for a Transformer."""
    seconds: float | None = None
    """Of the training."""
    diverged: str | None = None
    """The step and the reason."""

    def __str__(self) -> str:
        if self.diverged is not None:
            return f"diverged: {self.diverged}"
        return f"{self.valid_loss:.4f} nats a token, {self.bits_per_byte:.4f} bits per byte"


@dataclass(frozen=True)
class Plan:
    """Every variant at every learning rate with the first seed, then at its best with the others.

    Each run takes as many `tokens`, in steps of the recipe's batches.
    """

    recipe: Recipe
    variants: tuple[str, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    tokens: int
    sources: tuple[str, ...]
    device: str
    dtype: str

    @property
    def runs(self) -> int:
        """The number of runs, at most: a variant that diverges at every rate has fewer."""
        return len(self.variants) * (len(self.learning_rates) + len(self.seeds) - 1)

    @property
    def steps(self) -> int:
        return -(-self.tokens // (self.recipe.batch_size * self.recipe.seq_len))

    def jobs(self, outcomes: Mapping[Job, Outcome]) -> Iterator[Job]:
        """The runs in order. `outcomes` must hold those of the sweep once the sweep is over."""
        for variant in self.variants:
            for lr in self.learning_rates:
                yield Job(variant, lr, self.seeds[0])
        for seed in self.seeds[1:]:
            for variant in self.variants:
                if (lr := self.best_rate(variant, outcomes)) is not None:
                    yield Job(variant, lr, seed)

    def candidates(self) -> list[Job]:
        """Every run that `jobs` may give."""
        return [Job(*fields) for fields in product(self.variants, self.learning_rates, self.seeds)]

    def best_rate(self, variant: str, outcomes: Mapping[Job, Outcome]) -> float | None:
        """The best of the sweep so far; None where every run diverged."""
        losses = {
            lr: loss for lr, loss in self.sweep(variant, outcomes).items() if loss is not None
        }
        return min(losses, key=losses.__getitem__, default=None)

    def sweep(self, variant: str, outcomes: Mapping[Job, Outcome]) -> dict[float, float | None]:
        """The first seed's loss at every learning rate that has run."""
        jobs = [Job(variant, lr, self.seeds[0]) for lr in self.learning_rates]
        return {job.lr: outcomes[job].valid_loss for job in jobs if job in outcomes}

    def data(self) -> DataConfig:
        return DataConfig(sources=self.sources, vocab_size=self.recipe.vocab_size)

    def config(self, job: Job) -> RunConfig:
        recipe, steps = self.recipe, self.steps
        return RunConfig(
            model=model_options(recipe, job.variant),
            data=self.data(),
            optimizer=OptimizerConfig(
                lr=job.lr, warmup=round(recipe.warmup * steps), clip=recipe.clip
            ),
            train=TrainConfig(
                steps=steps,
                batch_size=recipe.batch_size,
                seq_len=recipe.seq_len,
                seed=job.seed,
                device=self.device,
                dtype=self.dtype,
                save_every=-(-steps // 10),
                keep=1,
                valid_every=0,
                sample_every=0,
                sample_tokens=1,
            ),
        )
