"""Wrote `fixtures/`, with the code of before configs were nested (commit f58f91f).

    git worktree add ../old f58f91f && cd ../old
    PYTHONPATH=. python ../retentive/tests/compat/make.py ../retentive/tests/compat/fixtures

It does not run with the code of today, and has no reason to: what it wrote has to open for ever.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from retentive.models.files import fingerprint, write_tensors

from retentive.adapters.initial_state import InitialState, begin_with
from retentive.cli import main
from retentive.compress.quantize import quantize
from retentive.data.tokenizer import byte_tokenizer
from retentive.inference.sampling import Sampling
from retentive.inference.session import Session
from retentive.models.checkpoint import save_model
from retentive.models.config import RetNetConfig, TransformerConfig
from retentive.models.retnet import RetNet
from retentive.models.transformer import Transformer

OUT = Path(sys.argv[1])
SMALL = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2}
MODELS = {
    "retnet": {},
    "retnet-official": {
        "gated_ffn": True,
        "hidden_act": "swish",
        "norm": "rmsnorm",
        "head_norm": "rmsnorm",
        "decay": "linspace",
        "rotation": "rope",
        "row_scale": True,
        "tie_word_embeddings": True,
    },
    "ablated": {"gate": False, "head_norm": "none", "decay": (0.0, -0.1), "dropout": 0.1},
    "post-norm": {
        "block": "post-norm",
        "residual_scale": 2**0.5,
        "final_norm": False,
        "embed_scale": 4.0,
        "embed_norm": True,
        "ffn_bias": True,
        "ffn_subln": "layernorm",
    },
    "parallel": {
        "block": "parallel",
        "hidden_act": "gelu_tanh",
        "gate_act": "gelu",
        "head_norm_affine": True,
        "rotary_dim": 4,
        "num_kv_heads": 1,
        "qkv_bias": True,
        "gate_bias": True,
        "out_bias": True,
        "head_bias": True,
    },
    "xpos": {"block": "output-norm", "rotation": "rope-across-heads", "xpos_base": 16.0},
    "hybrid": {"attention_layers": (1,), "attention": {"num_heads": 2, "window": 4}},
    "hybrid-whole": {"attention_layers": (0,), "attention": {"num_heads": 2, "num_kv_heads": 1}},
}
TRANSFORMERS = {"transformer": {}, "transformer-gqa": {"num_kv_heads": 1, "gated_ffn": True}}
TOKENS = torch.tensor([[5, 100, 251, 7, 31, 8, 8, 90, 2, 1, 77, 3]] * 2) + torch.arange(2)[:, None]
RUN = """
[model]
KIND
hidden_size = 8
num_hidden_layers = 2
num_heads = 2
gated_ffn = true

[data]
sources = ["corpus.txt"]
tokenizer = "bytes"
valid_fraction = 0.2

[train]
steps = 6
batch_size = 2
seq_len = 24
CARRY
dtype = "float64"
save_every = 3
keep = 2
sample_tokens = 3
"""


def build(name):
    torch.manual_seed(0)
    if name in TRANSFORMERS:
        model = Transformer(TransformerConfig(**SMALL, **TRANSFORMERS[name]))
    else:
        model = RetNet(RetNetConfig(**SMALL, **MODELS[name]))
    model.init_weights(seed=0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.3 * torch.randn(weight.shape))
    return model.eval()


def models():
    facts, tensors = {}, {"tokens": TOKENS}
    made = {name: build(name) for name in (*MODELS, *TRANSFORMERS)}
    for bits in (8, 4):
        made[f"int{bits}"] = quantize(build("retnet"), bits)
    for name, model in made.items():
        save_model(model, OUT / "models" / name)
        facts[name] = {"fingerprint": fingerprint(model)}
        if not name.startswith("int"):
            with torch.no_grad():
                tensors[name] = model.double()(TOKENS)[0][..., :16]
    model = build("retnet")
    adapter = InitialState(model)
    begin_with(model, torch.randn(2, 2, 8, 16))
    adapter.save(OUT_TUNED)
    with torch.no_grad():
        tensors["tuned"] = model.double()(TOKENS)[0][..., :16]
    (OUT / "models.json").write_text(json.dumps(facts, indent=1) + "\n")
    write_tensors(OUT / "logits.safetensors", tensors, {})


def sessions():
    for name in ("retnet", "hybrid", "transformer"):
        model, tokenizer = build(name).double(), byte_tokenizer()
        session = Session(model, tokenizer, Sampling(temperature=0.8, top_k=20, seed=7))
        session.read(["hello", "a longer prompt"])
        list(session.steps(4))
        session.save(OUT / f"{name}.state")
        pieces = [list(map(list, step)) for step in session.steps(8)]
        (OUT / f"{name}.pieces.json").write_text(json.dumps(pieces))


def runs():
    corpus = "\f".join(f"The {n}th line of it.\n" * 6 for n in range(12))
    (OUT / "corpus.txt").write_text(corpus)
    for name, kind, carry in (
        ("run-retnet", "", "carry_state = true"),
        ("run-transformer", 'kind = "transformer"', ""),
    ):
        (OUT / f"{name}.toml").write_text(RUN.replace("KIND", kind).replace("CARRY", carry))
        command = ["train", f"{name}.toml", "--out", name]
        assert main(command) == 0
        write_tensors(OUT / f"{name}.final.safetensors", load(OUT / name / "model.safetensors"), {})
        # As after a stop at the first checkpoint
        shutil.rmtree(OUT / name / "checkpoints" / "step-00000006")
        for path in (OUT / name).iterdir():
            if path.is_file():
                path.unlink()


def load(path):
    from safetensors.torch import load_file

    return load_file(path)


OUT_TUNED = OUT / "tuned"
OUT_TUNED.mkdir(parents=True, exist_ok=True)
models()
sessions()
import os  # noqa: E402

os.chdir(OUT)
runs()
