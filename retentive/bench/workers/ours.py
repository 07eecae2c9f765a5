"""Our models and our op, in a process of their own."""

import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from retentive import __version__
from retentive.bench.workers import tasks
from retentive.bench.workers.along import TIMED, prepare_along
from retentive.bench.workers.ops import prepare_op, prepare_step, sdpa_kernel_of
from retentive.bench.workers.serving import Answer, Case, Run, Send, serve
from retentive.convert.loading import load
from retentive.decoding.graphs import Step, record
from retentive.decoding.runner import runner
from retentive.devices import keep_freed_memory, resolve_dtype
from retentive.inference.session import read_tokens
from retentive.kernels.triton import available
from retentive.mixers.kv_cache import KVCache
from retentive.models.build import build_model
from retentive.models.config import config_from_dict
from retentive.models.counts import parameters, state_bytes
from retentive.models.language_model import LanguageModel
from retentive.models.state import ModelState
from retentive.models.transformer import Transformer

ROOM = 4096  # more tokens that fit into a filled cache


class Ours:
    """A model of this package as a benchmark's model (`tasks.Model`)."""

    def __init__(self, case: Case):
        self.model = model_of(case)
        self._by_runner, self._math = case.get("runner", False), case.get("math", False)
        self.model.checkpoint_layers = case.get("checkpoint", False)
        config = config_from_dict(case["config"])
        self.grows = self.model.state_grows
        if not self.grows:
            self.model.set_kernels(form=case["retention"], backend=case["backend"])
        self.facts: dict[str, Any] = {
            "version": __version__,
            "form": case["form"],
            "parameters": sum(parameters(config).values()),
            "weight_bytes": read_bytes(self.model),
        }
        on_gpu = self.model.device.type == "cuda"
        if on_gpu and case["task"] == "train" and self.grows:
            self.facts["form"] += f": {training_kernel(cast(Transformer, self.model), case)}"
        if config.quantization is not None:
            self.facts["form"] += f", {config.quantization.bits} bit"

    def parameters(self) -> Iterable[Tensor]:
        return self.model.train().parameters()

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """As in a training run: the rows packed, no state, the logits never all at once."""
        rows, length = tokens.shape
        layout = self.model.packed_layout(torch.arange(0, rows * length + 1, length))
        with sdpa_kernel(SDPBackend.MATH) if self._math else nullcontext():
            hidden, _ = self.model.hidden(tokens.view(1, -1), layout=layout)
        return self.model.loss(hidden, targets.view(1, -1))

    def read(self, tokens: Tensor) -> Tensor:
        """As generation reads a prompt: all but the last token, then its logits."""
        *prompt, last = tokens[0].tolist()
        state = self.model.init_state(1, capacity=len(prompt) + 1)
        state = read_tokens(self.model, [prompt], state)
        hidden, _ = self.model.hidden(tokens.new_tensor([[last]]), state)
        return self.model.head(hidden[:, -1])

    def decoder(self, batch: int, context: int) -> "Decoder":
        if self.grows:
            on_gpu = self.model.device.type == "cuda"
            decoder = CacheDecoder.empty(
                cast(Transformer, self.model), batch, context + (1 if on_gpu else ROOM)
            )
            decoder.skip(context)
            if not on_gpu:
                return decoder
            self.facts["form"] += f": {decoder.sdpa_kernel}"
            return RecordedDecoder(decoder, record)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, self.model.config.vocab_size, (context,), generator=generator)
        state = read_tokens(self.model, [tokens.tolist()], self.model.init_state(1))
        return self._recurrent(state.select([0] * batch))

    def fresh_decoder(self, batch: int, tokens: int) -> "Decoder":
        """Decodes from the first token on; a cache has room for `tokens`."""
        if self.grows:
            return CacheDecoder.empty(cast(Transformer, self.model), batch, tokens)
        return self._recurrent(self.model.init_state(batch))

    def _recurrent(self, state: ModelState) -> "Decoder":
        return (RunnerDecoder if self._by_runner else Decoder)(self.model, state)


class Decoder:
    """Decodes by the model's own calls, a token at a time."""

    def __init__(self, model: LanguageModel, state: ModelState):
        self.model, self.state = model, state
        self.rows, self.context = state.batch_size, int(state.positions[0])

    @property
    def state_bytes(self) -> int:
        """In use, without the room that a cache has for more tokens."""
        return self.rows * state_bytes(self.model.config, self.context, dtype=self.model.dtype)

    def __call__(self, tokens: Tensor) -> Tensor:
        hidden, state = self.model.hidden(tokens[:, None], self.state)
        assert state is not None
        self.state = state
        self.context += 1
        return self.model.head(hidden[:, -1])

    def skip(self, count: int) -> bool:
        return False

    def fork(self) -> Self:
        return type(self)(self.model, self.state.clone())


class RunnerDecoder(Decoder):
    """Decodes as `retentive generate` does: the state is updated in place."""

    def __init__(self, model: LanguageModel, state: ModelState):
        self.model = model
        self.rows, self.context = state.batch_size, int(state.positions[0])
        self._runner = runner(model, state)  # with its own copy of the state

    def __call__(self, tokens: Tensor) -> Tensor:
        self.context += 1
        return self._runner.step(tokens)

    def fork(self) -> Self:
        return type(self)(self.model, self._runner.state)


class CacheDecoder(Decoder):
    """Decodes with a Transformer, whose caches can be filled instead."""

    model: Transformer

    @classmethod
    def empty(cls, model: Transformer, batch: int, room: int) -> Self:
        """With room that takes no memory before it is used."""
        config = model.config
        head_dim = config.hidden_size // config.mixer.num_heads
        shape = (batch, config.mixer.kv_heads, room, head_dim)
        like: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
        caches = [
            KVCache.from_kv((torch.empty(shape, **like), torch.empty(shape, **like)), (0,) * batch)
            for _ in model.layers
        ]
        return cls(model, ModelState(model.init_state(batch).positions, caches))

    @property
    def sdpa_kernel(self) -> str:
        """The kernel of a step, whose queries are the heads of a group."""
        k, _ = cast(KVCache, self.state.layers[0]).kv
        heads = self.model.config.mixer.num_heads
        q = k.new_empty(self.rows, k.shape[1], heads // k.shape[1], k.shape[3])
        return sdpa_kernel_of(q, k, causal=False)

    @torch.inference_mode()
    def skip(self, count: int) -> bool:
        """By random keys and values, which cost the same time as real ones."""
        caches = []
        for cache in self.state.layers:
            end = cache.lengths[0] + count
            for buffer in cache.buffers.kv:
                buffer[:, :, cache.lengths[0] : end].normal_()
            caches.append(KVCache.from_kv(cache.buffers.kv, (end,) * len(cache.lengths)))
        self.state = ModelState(self.state.positions + count, caches)
        self.context += count
        return True


class RecordedDecoder(Decoder):
    """Decodes with a Transformer's step as a CUDA graph, as fast as its kernels: like ours.

    A replay overwrites the same token behind the context, which costs the same time as the next.
    """

    def __init__(self, decoder: CacheDecoder, record: Callable[[Step], Step]):
        super().__init__(decoder.model, decoder.state)
        self._tokens = torch.zeros(self.rows, dtype=torch.int64, device=self.model.device)
        self._replay = record(self._step)

    def _step(self) -> Tensor:
        caches = [
            KVCache.from_kv(cache.buffers.kv, cache.lengths)
            for cache in cast(list[KVCache], self.state.layers)
        ]
        state = ModelState(self.state.positions, caches)
        hidden, _ = self.model.hidden(self._tokens[:, None], state)
        return self.model.head(hidden[:, -1])

    def __call__(self, tokens: Tensor) -> Tensor:
        self._tokens.copy_(tokens)
        return self._replay()


def model_of(case: Case) -> LanguageModel:
    """The model of `case["folder"]`, or one with random weights of `case["config"]`."""
    device, dtype = case["device"], "float32" if case["task"] == "train" else case["dtype"]
    if "folder" in case:
        return load(case["folder"], device=device, dtype=dtype)
    config = config_from_dict(case["config"])
    with torch.device(device):
        return build_model(config).to(resolve_dtype(dtype)).eval()


def training_kernel(model: Transformer, case: Case) -> str:
    """The kernel that SDPA takes in a training step, under autocast where the case asks for it."""
    mixer, dtype = model.config.mixer, resolve_dtype(case["dtype"])
    head_dim = model.config.hidden_size // mixer.num_heads
    q, k = (
        torch.empty(1, heads, case["tokens"], head_dim, dtype=dtype, device=model.device)
        for heads in (mixer.num_heads, mixer.kv_heads)
    )
    return sdpa_kernel_of(q.requires_grad_(), k.requires_grad_(), causal=True)


def read_bytes(model: LanguageModel) -> int:
    """Bytes of the weights that every token reads: the embedding table only if it is the head."""
    embedding = model.embed_tokens
    held = (*embedding.parameters(), *embedding.buffers())
    table = 0 if model.lm_head is None else sum(x.nbytes for x in held)
    weights = {x.data_ptr(): x.nbytes for x in (*model.parameters(), *model.buffers())}
    return sum(weights.values()) - table


def prepare(case: Case, send: Send) -> tuple[Answer, Run]:
    if case["task"] == "op":
        return prepare_op(case)
    if case["task"] == "step":
        return prepare_step(case)
    if case["task"] == "train":
        keep_freed_memory()  # as `retentive train` does
    ours = Ours(case)
    if case["task"] == "along":
        decoder = ours.fresh_decoder(case["batch"], case["marks"][-1] + TIMED)
        facts, run = prepare_along(decoder, case, send)
        return {**ours.facts, "dtype": case["dtype"], **facts}, run
    return tasks.prepare(ours, case)


def allow_any_ptxas() -> None:
    """Allows every ptxas where `benchmarks/gpu.sh` says so; its tests tell whether one errs."""
    if os.environ.get("RETENTIVE_BENCH_ANY_PTXAS") == "1":
        available.SOUND_PTXAS = (0, 0)


if __name__ == "__main__":
    serve(allow_any_ptxas, prepare)
