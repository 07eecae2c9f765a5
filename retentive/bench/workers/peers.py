"""Other people's RetNets, in a process of their own; imports nothing else of this package.

q, k are `[1,H,T,K]` and v is `[1,H,T,V]`, or in the layout that a package works in.
"""

import sys
from collections.abc import Iterable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from retentive.bench.workers import tasks
from retentive.bench.workers.serving import Answer, Case, Run, Send, serve

# pyright: reportMissingImports=false


# The op


def yet_another_retnet_op(case: Case) -> Run:
    """A chunk a call. Its README slices a chunk at a time, whose backward grows with T²/C; inputs
    that are split once avoid that.
    """
    from yet_another_retnet.retention import retention_chunkwise

    leaves = tasks.op_inputs(case, "heads first")
    C, tokens = case["chunk_size"], case["tokens"]

    def pieces() -> Iterable[Any]:
        if case["split_once"]:
            return zip(*(x.split(C, dim=2) for x in leaves), strict=True)
        return ([x[:, :, at : at + C] for x in leaves] for at in range(0, tokens, C))

    def forward() -> Tensor:
        outputs, state = [], None
        for piece in pieces():
            o, state = retention_chunkwise(*piece, state)
            outputs.append(o)
        return torch.cat(outputs, dim=2)

    return tasks.op_run(forward, leaves, case["device"])


def torchscale_op(case: Case) -> Run:
    stub_imports()
    from torchscale.component.multiscale_retention import MultiScaleRetention

    q, k, v = tasks.op_inputs(case, "heads first")
    C, heads = case["chunk_size"], case["heads"]
    if case["tokens"] % C:
        raise ValueError(f"it takes whole chunks only: {case['tokens']} is no multiple of {C}")
    layer = SimpleNamespace(num_heads=heads, key_dim=case["key_dim"], head_dim=case["value_dim"])
    # Its model builds these once a forward for all layers, so they are not timed.
    log_decay = torch.log1p(-torch.exp2(-5.0 - torch.arange(heads)))[:, None, None]
    n = torch.arange(C)
    mask = torch.exp(log_decay * (n[:, None] - n).clamp(min=0)).tril()
    until_end, scale = mask[:, -1:].transpose(1, 2), mask.sum(-1, keepdim=True).sqrt()
    total = until_end.sum(1, keepdim=True)
    from_start = torch.exp(log_decay * (n[:, None] + 1)) / scale * total
    inner = (mask / scale, torch.exp(log_decay * C), from_start, until_end / total)
    inner = tuple(x.to(q) for x in inner)
    values = v.detach().transpose(1, 2).flatten(2).requires_grad_()

    def forward() -> Tensor:
        return MultiScaleRetention.chunk_recurrent_forward(layer, q, k, values, inner)

    return tasks.op_run(forward, [q, k, values], case["device"])


# The model


class YetAnotherRetNet:
    """It has V = K; the config has a wider FFN, so that parameters are equal."""

    def __init__(self, case: Case):
        from yet_another_retnet.retnet import RetNet

        config, self.chunk_size = case["config"], case.get("chunk_size")
        model = RetNet(
            config["vocab_size"],
            config["hidden_size"],
            config["num_heads"],
            config["num_hidden_layers"],
            dropout=0.0,
            dim_feedforward=config["intermediate_size"],
        )
        if config["tie_word_embeddings"]:
            model.out.weight = model.embedding.weight
        self.model = placed(model, case)
        self.facts = facts(self.model, case, self.chunk_size)

    def parameters(self) -> Iterable[Tensor]:
        return self.model.train().parameters()

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = torch.cat([piece for piece, _ in self._pieces(tokens)], dim=1)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def read(self, tokens: Tensor) -> object:
        """Up to the states, of which the parallel form has none."""
        return [states for _, states in self._pieces(tokens)][-1]

    def _pieces(self, tokens: Tensor) -> Iterable[tuple[Tensor, Any]]:
        """Logits and states chunk by chunk, or of all tokens at once in the parallel form."""
        if self.chunk_size is None:
            yield self.model.forward_parallel(tokens), None
            return
        states: Any = ()
        for index, piece in enumerate(tokens.split(self.chunk_size, dim=1)):
            logits, states = self.model.forward_chunkwise(piece, index * self.chunk_size, states)
            yield logits, states

    def decoder(self, batch: int, context: int) -> tasks.Step:
        tokens = torch.randint(0, self.model.out.out_features, (batch, context))
        self.chunk_size = min(context, 512)
        states: Any = self.read(tokens.to(self.model.out.weight.device))
        position = context

        def step(token: Tensor) -> Tensor:
            nonlocal states, position
            logits, states = self.model.forward_recurrent(token, position, states)
            position += 1
            return logits

        return step


class TorchScale:
    def __init__(self, case: Case):
        stub_imports()
        from torchscale.architecture.config import RetNetConfig
        from torchscale.architecture.retnet import RetNetDecoder

        config, chunk_size = case["config"], case.get("chunk_size")
        width, vocab_size = config["hidden_size"], config["vocab_size"]
        arguments = RetNetConfig(
            vocab_size=vocab_size,
            decoder_embed_dim=width,
            decoder_value_embed_dim=config["value_dim"],
            decoder_retention_heads=config["num_heads"],
            decoder_ffn_embed_dim=config["intermediate_size"],
            decoder_layers=config["num_hidden_layers"],
            share_decoder_input_output_embed=config["tie_word_embeddings"],
            chunkwise_recurrent=chunk_size is not None,
            recurrent_chunk_size=chunk_size or 512,
        )
        self.model = placed(RetNetDecoder(arguments, torch.nn.Embedding(vocab_size, width)), case)
        self.facts = facts(self.model, case, chunk_size)

    def parameters(self) -> Iterable[Tensor]:
        return self.model.train().parameters()

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits, _ = self.model(tokens)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def read(self, tokens: Tensor) -> object:
        """Up to the logits: its prefill into a state crashes."""
        return self.model(tokens)

    def decoder(self, batch: int, context: int) -> tasks.Step:
        """From the state of 64 decoded tokens, as large as that of any context."""
        state: dict[Any, Any] = {}
        position = 0

        def step(token: Tensor) -> Tensor:
            nonlocal position
            position += 1  # it takes the number of tokens, and computes with the last only
            tokens = token[:, None].expand(-1, position)
            logits, _ = self.model(tokens, incremental_state=state)
            return logits[:, -1]

        token = torch.zeros(batch, dtype=torch.int64, device=self.model.embed_tokens.weight.device)
        for _ in range(min(context, 64)):
            step(token)
        position = context
        return step


def placed(model: torch.nn.Module, case: Case) -> Any:
    dtype = "float32" if case["task"] == "train" else case["dtype"]
    return model.to(case["device"], getattr(torch, dtype)).eval()


def facts(model: torch.nn.Module, case: Case, chunk_size: int | None) -> dict[str, Any]:
    form = "parallel" if chunk_size is None else f"chunkwise, C {chunk_size}"
    if case["task"] == "decode":
        form = "recurrent"
    count = sum(weight.numel() for weight in model.parameters())
    return {"form": form, "parameters": count, "version": case["version"]}


def stub_imports() -> None:
    """Stubs of fairscale and timm, which torchscale imports and does not need here."""

    def unused(*_: object) -> None:
        raise NotImplementedError

    names = {
        "fairscale": {},
        "fairscale.nn": {"checkpoint_wrapper": unused, "wrap": unused},
        "timm": {},
        "timm.models": {},
        "timm.models.layers": {"drop_path": unused},
    }
    for name, contents in names.items():
        module = ModuleType(name)
        vars(module).update(contents)
        sys.modules.setdefault(name, module)


OPS = {"yet-another-retnet": yet_another_retnet_op, "torchscale": torchscale_op}
MODELS = {"yet-another-retnet": YetAnotherRetNet, "torchscale": TorchScale}


def prepare(case: Case, send: Send) -> tuple[Answer, Run]:
    if case["task"] == "op":
        run = OPS[case["package"]](case)
        facts = ("version", "form", "dtype", "chunk_size")
        return {name: case[name] for name in facts}, run
    return tasks.prepare(MODELS[case["package"]](case), case)


if __name__ == "__main__":
    serve(lambda: None, prepare)
