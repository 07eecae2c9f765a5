"""One run's model, optimizer and place in the data, and the update that moves all three."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from retentive.adapters.initial_state import InitialState
from retentive.adapters.lora import Lora
from retentive.convert.loading import load
from retentive.data.batches import NO_TARGET, Batch, BatchOrder
from retentive.data.dataset import Corpus
from retentive.devices import resolve_device, resolve_dtype
from retentive.errors import InputError
from retentive.io.tensors import read_tensors, write_tensors
from retentive.models.build import build_model
from retentive.models.checkpoint import load_state, save_model
from retentive.models.fingerprint import fingerprint
from retentive.models.language_model import LanguageModel
from retentive.models.state import ModelState, concat
from retentive.train.config import RunConfig
from retentive.train.optimizer import (
    build_optimizer,
    learning_rate,
    optimizer_tensors,
    restore_optimizer,
)

OPTIMIZER = "optimizer.safetensors"
CARRIED = "state.safetensors"


class Diverged(InputError):
    """A run came to a loss or a gradient that is not finite."""


class Trainer:
    """Everything that an update reads and changes. A checkpoint holds all of it.

    `step` counts the updates made. `checkpoint` is the folder to go on from, None for a new run.
    """

    def __init__(self, config: RunConfig, corpus: Corpus, checkpoint: Path | None = None):
        train = config.train
        self.config = config
        self.device = resolve_device(train.device)
        self.dtype = compute_dtype(train.dtype, self.device)
        self.order = BatchOrder(
            corpus.train, train.batch_size, train.seq_len, train.seed, carry=train.carry_state
        )
        self.step = 0
        self.adapter: Lora | InitialState | None = None
        with enough_memory("the model", self.device, "take a smaller one, or another --device"):
            self.model = self._build_model(corpus.vocab_size, checkpoint)
            self.optimizer = build_optimizer(self.model, config.optimizer)
            # Carried from step to step, a row for each of the batch's.
            self.state = None
            if train.carry_state:
                self.state = self.model.init_state(train.batch_size).detach()
            if checkpoint is not None:
                self._restore(checkpoint)

    def _build_model(self, vocab_size: int, checkpoint: Path | None) -> LanguageModel:
        """The model, and what is applied to it from outside: adapter, checkpointing, compilation.

        A checkpoint has the model itself, or the adapter of the base.
        """
        config, train = self.config.model, self.config.train
        exact = "float64" if self.dtype is torch.float64 else "float32"
        adapts = self.config.adapter.kind != "none"
        torch.manual_seed(train.seed)
        if checkpoint is not None and not adapts:
            model = load(checkpoint, device=str(self.device), dtype=exact)
        elif config.base is not None:
            model = load(config.base_folder, device=str(self.device), dtype=exact)
        else:
            with self.device:
                model = build_model(config.build(vocab_size)).to(resolve_dtype(exact))
        if adapts:
            self.adapter = self._adapt(model)
            if checkpoint is not None:
                self.adapter.restore(checkpoint)
        model.checkpoint_layers = train.checkpoint_layers
        if train.compile:
            for layer in model.layers:
                layer.compile()
        return model.train()

    def _adapt(self, model: LanguageModel) -> Lora | InitialState:
        """What is trained in the place of the model's weights, which are frozen."""
        options = self.config.adapter
        if options.kind == "state":
            return InitialState(model)
        return Lora(
            model,
            str(self.config.model.base),
            rank=options.rank,
            alpha=options.alpha,
            dropout=options.dropout,
            targets=options.targets,
        )

    def update(self) -> dict[str, float]:
        """One update of the weights; its loss (nats a token), learning rate, norm and tokens.

        Raises Diverged before the weights are touched if the loss or gradient is not finite.
        """
        batch = self.order.batch(self.step)
        tokens = int((batch.targets != NO_TARGET).sum())
        loss = self._accumulate_gradients(batch, tokens)
        settings = self.config.optimizer
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = "gradient" if math.isfinite(loss) else "loss"
            raise Diverged(
                f"the {what} of step {self.step + 1} is not finite; the run stops, the weights are "
                "as they were: try a lower --optimizer.lr, a longer --optimizer.warmup or --dtype "
                "float32"
            )
        lr = learning_rate(settings, self.step, self.config.train.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"loss": loss, "lr": lr, "grad_norm": norm, "tokens": tokens}

    def _accumulate_gradients(self, batch: Batch, tokens: int) -> float:
        """The mean loss over the batch's `tokens`, its gradients added up a few rows at a time."""
        rows = self.config.train.micro_batch or len(batch.tokens)
        losses, left = [], []
        for piece in torch.arange(len(batch.tokens)).split(rows):
            part, state = batch_rows(batch, piece), self._enter(batch, piece)
            with autocast(self.device, self.dtype):
                loss, state = batch_loss(self.model, part, state)
            (loss / tokens).backward()
            losses.append(loss.detach())
            left.append(state)
        if self.state is not None:
            self.state = concat(left).detach()
        return torch.stack(losses).sum().item() / tokens

    def _enter(self, batch: Batch, rows: Tensor) -> ModelState | None:
        """The carried state of some rows; afresh where a row does not continue its document."""
        if self.state is None:
            return None
        return self.model.restart_rows(self.state.select(rows), ~batch.continues[rows])

    def save(self, folder: Path) -> None:
        """Writes the model, or its adapter, and all else that the next update depends on."""
        if self.adapter is None:
            save_model(self.model, folder)
        else:
            self.adapter.save(folder)
        tensors = optimizer_tensors(self.model, self.optimizer) | random_states(self.device)
        write_tensors(folder / OPTIMIZER, tensors, {"format": "pt"})
        if self.state is not None:
            self.state.save(folder / CARRIED, fingerprint=fingerprint(self.model))

    def _restore(self, folder: Path) -> None:
        tensors, _ = read_tensors(folder / OPTIMIZER, "the checkpoint's")
        take_random_states(tensors, self.device)
        restore_optimizer(self.model, self.optimizer, tensors)
        if self.state is not None:
            self.state, _, _ = load_state(folder / CARRIED, self.model)


@contextlib.contextmanager
def enough_memory(what: str, device: torch.device, remedy: str) -> Iterator[None]:
    """What does not fit within the block, as one line: `what`, and the `remedy`."""
    try:
        yield
    except RuntimeError as error:
        # The allocators of the CPU and of Metal have no exception of their own.
        said = ("DefaultCPUAllocator", "MPS backend out of memory")
        if isinstance(error, torch.OutOfMemoryError) or any(s in str(error) for s in said):
            raise InputError(f"{what} needs more memory than {device} has; {remedy}") from None
        raise


def batch_loss(
    model: LanguageModel, batch: Batch, state: ModelState | None
) -> tuple[Tensor, ModelState | None]:
    """The loss summed over a batch's tokens, and the state of its rows if they came with one."""
    rows = None if state is None else len(batch.tokens)
    layout = model.packed_layout(batch.cu_seqlens, rows=rows, state=state)
    tokens, targets = (x.to(model.device).view(1, -1) for x in (batch.tokens, batch.targets))
    hidden, state = model.hidden(tokens, state, layout=layout)
    return model.loss(hidden, targets, reduction="sum"), state


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The random-number generators' states, as tensors to save."""
    states = {"random.cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[f"random.{device.type}"] = torch.get_device_module(device).get_rng_state()
    return states


def take_random_states(tensors: dict[str, Tensor], device: torch.device) -> None:
    """Takes `random_states` out of `tensors` into place; the run may have moved to `device`."""
    torch.set_rng_state(tensors.pop("random.cpu"))
    for name in [name for name in tensors if name.startswith("random.")]:
        state = tensors.pop(name)
        if name == f"random.{device.type}":
            torch.get_device_module(device).set_rng_state(state)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the arithmetic: bfloat16 by autocast, float32, or float64 (weights too)."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if (dtype := resolve_dtype(name)) is torch.float16:
        raise InputError(
            "training in float16 overflows; choose bfloat16, which has its range, or float32"
        )
    return dtype


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Where the arithmetic is bfloat16, products are and the rest stays float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16)


def batch_rows(batch: Batch, rows: Tensor) -> Batch:
    """Consecutive rows of a batch. Every row begins a sequence, so the cuts fall between two."""
    seq_len = batch.tokens.shape[1]
    start, stop = int(rows[0]) * seq_len, (int(rows[-1]) + 1) * seq_len
    bounds = batch.cu_seqlens[(batch.cu_seqlens >= start) & (batch.cu_seqlens <= stop)]
    return Batch(batch.tokens[rows], batch.targets[rows], bounds - start, batch.continues[rows])
