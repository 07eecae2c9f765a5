"""Compiles kernels by running them once, so that other processes find them in Triton's cache.

python benchmarks/gpu/fill_cache.py ours DTYPE N     the N-th tile sizes of our kernels
python benchmarks/gpu/fill_cache.py fla K V          flash-linear-attention's op
python benchmarks/gpu/fill_cache.py fla-model D K    its RetNet, one layer of width D
"""

import sys

import torch

from retentive.bench.workers import huggingface, tasks
from retentive.bench.workers.ours import allow_any_ptxas
from retentive.ops import retention
from retentive.ops.decay import log_decay

DIMS = ((256, 512), (128, 256), (64, 128))
TOKENS = 512
FEW, MANY = 1, 64
"""Rows: too few to fill the GPU, where chunks run in parallel; and enough for whole sequences."""


def ours(dtype: str, number: str) -> None:
    """The configuration of that number of each kernel, the first where it has fewer."""
    from retentive.kernels.triton import configs

    allow_any_ptxas()
    tune = configs.triton.autotune

    def only_one(choices: list, key: list[str]):
        at = int(number)
        return tune(choices[at : at + 1] or choices[:1], key=key)

    configs.triton.autotune = only_one  # pyright: ignore[reportAttributeAccessIssue]
    rates = log_decay(4).cuda()
    for K, V in DIMS:
        for rows in (FEW, MANY):
            case = {"batch": rows, "tokens": TOKENS, "heads": 4, "key_dim": K, "value_dim": V}
            q, k, v = tasks.op_inputs({**case, "device": "cuda", "dtype": dtype}, "tokens first")
            state = torch.zeros(rows, 4, K, V, device="cuda", requires_grad=True)
            for initial in (None, state):
                o, final = retention(q, k, v, rates, state=initial, backend="triton")
                assert final is not None
                (o.float().sum() + final.sum()).backward()


def fla(K: str, V: str) -> None:
    case = {"batch": 16, "tokens": 2048, "heads": 2048 // int(K)}
    case |= {"key_dim": int(K), "value_dim": int(V)}
    huggingface.fla_op({**case, "device": "cuda", "dtype": "bfloat16"})


def fla_model(width: str, K: str) -> None:
    from retentive.models.config import RetNetConfig

    sizes = {"vocab_size": 50304, "hidden_size": int(width), "num_hidden_layers": 1}
    heads = int(width) // int(K)
    config = RetNetConfig.from_dict({**sizes, "num_heads": heads, "gated_ffn": True})
    case = {"task": "train", "device": "cuda", "dtype": "bfloat16", "version": "", "form": ""}
    case |= {"config": config.to_dict(), "batch": 1, "tokens": 8192}
    tasks.prepare(huggingface.FlashLinearAttention(case), case)


if __name__ == "__main__":
    {"ours": ours, "fla": fla, "fla-model": fla_model}[sys.argv[1]](*sys.argv[2:])
