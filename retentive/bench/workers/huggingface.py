"""Causal language models of transformers' interface: Llama, flash-linear-attention's RetNet."""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from retentive.bench.workers import tasks
from retentive.bench.workers.serving import Answer, Case, Run, Send, serve

# pyright: reportMissingImports=false


class HuggingFace:
    model: Any
    facts: dict[str, Any]

    def place(self, model: Any, case: Case) -> None:
        dtype = "float32" if case["task"] == "train" else case["dtype"]
        self.model = model.to(case["device"], getattr(torch, dtype)).eval()
        if case.get("checkpoint"):
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.facts = {
            "version": case["version"],
            "form": case["form"],
            "parameters": self.model.num_parameters(),
        }

    def parameters(self) -> Iterable[Tensor]:
        return self.model.train().parameters()

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Its own loss, which shifts the labels by one more token."""
        return self.model(input_ids=tokens, labels=targets, use_cache=False).loss

    def read(self, tokens: Tensor) -> Any:
        return self.model(input_ids=tokens, use_cache=True, logits_to_keep=1)

    def decoder(self, batch: int, context: int) -> tasks.Step:
        tokens = torch.randint(0, self.model.config.vocab_size, (batch, context))
        return self._steps(self.read(tokens.to(self.model.device)).past_key_values)

    def _steps(self, cache: Any) -> tasks.Step:
        # The argument's name in transformers from 5.24 on, and before
        known = inspect.signature(self.model.forward).parameters
        name = "cache" if "cache" in known else "past_key_values"
        arguments = {name: cache, "use_cache": True, "logits_to_keep": 1}

        def step(token: Tensor) -> Tensor:
            return self.model(input_ids=token[:, None], **arguments).logits[:, -1]

        return step


class Llama(HuggingFace):
    def __init__(self, case: Case):
        from transformers import LlamaConfig, LlamaForCausalLM

        ours = case["config"]  # of our Transformer with as many parameters
        self.cache, self._room = case.get("cache", "dynamic"), case.get("room", 0)
        config = LlamaConfig(
            vocab_size=ours["vocab_size"],
            hidden_size=ours["hidden_size"],
            intermediate_size=ours["intermediate_size"],
            num_hidden_layers=ours["num_hidden_layers"],
            num_attention_heads=ours["num_heads"],
            num_key_value_heads=ours["num_kv_heads"],
            tie_word_embeddings=ours["tie_word_embeddings"],
            max_position_embeddings=2**20,
            attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
        )
        with torch.device(case["device"]):
            self.place(LlamaForCausalLM(config), case)
        if case["task"] == "decode":
            self.facts["form"] += f", {self.cache} cache"

    def decoder(self, batch: int, context: int) -> tasks.Step:
        """Behind random keys and values, which cost the same time as real ones."""
        from transformers import DynamicCache, StaticCache

        config = self.model.config
        if self.cache == "static":
            cache = StaticCache(config=config, max_cache_len=context + self._room)
        else:
            cache = DynamicCache(config=config)
        head_dim = config.hidden_size // config.num_attention_heads
        shape = (batch, config.num_key_value_heads, context, head_dim)
        like = self.model.lm_head.weight
        for layer in range(config.num_hidden_layers):
            k, v = (torch.randn(shape, dtype=like.dtype, device=like.device) for _ in range(2))
            cache.update(k, v, layer)
        return self._steps(cache)


class FlashLinearAttention(HuggingFace):
    """Its RetNet; its kernels need a CUDA device."""

    def __init__(self, case: Case):
        from fla.models import RetNetConfig, RetNetForCausalLM

        ours = case["config"]
        width = ours["hidden_size"]
        config = RetNetConfig(
            vocab_size=ours["vocab_size"],
            hidden_size=width,
            expand_k=ours["qk_dim"] / width,
            expand_v=ours["value_dim"] / width,
            num_heads=ours["num_heads"],
            num_hidden_layers=ours["num_hidden_layers"],
            intermediate_size=ours["intermediate_size"],
            tie_word_embeddings=ours["tie_word_embeddings"],
        )
        self.place(RetNetForCausalLM(config), case)


def fla_op(case: Case) -> Run:
    from fla.ops.retention import chunk_retention, fused_recurrent_retention

    op = fused_recurrent_retention if case.get("recurrent") else chunk_retention
    leaves = tasks.op_inputs(case, "tokens first")
    return tasks.op_run(lambda: op(*leaves)[0], leaves, case["device"])


def fla_step(case: Case) -> Run:
    """Its decoding step, as its layer calls it: the new state is a new tensor."""
    from fla.ops.retention import fused_recurrent_retention

    q, k, v = (x.detach() for x in tasks.op_inputs({**case, "tokens": 1}, "tokens first"))
    sizes = (case["batch"], case["heads"], case["key_dim"], case["value_dim"])
    state = torch.randn(sizes, device=case["device"])

    def step() -> Any:
        return fused_recurrent_retention(q, k, v, initial_state=state, output_final_state=True)

    return tasks.step_run(step, case["device"])


def load() -> None:
    import transformers.models.llama.modeling_llama  # noqa: F401


def prepare(case: Case, send: Send) -> tuple[Answer, Run]:
    if case["task"] in ("op", "step"):
        facts = {name: case[name] for name in ("version", "form", "dtype")}
        return facts, (fla_op if case["task"] == "op" else fla_step)(case)
    kind = Llama if case["package"] == "transformers" else FlashLinearAttention
    return tasks.prepare(kind(case), case)


if __name__ == "__main__":
    serve(load, prepare)
