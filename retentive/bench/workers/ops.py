"""The op alone: ours in every form and backend, and attention at the same width."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from retentive import __version__
from retentive.bench.workers.serving import Answer, Case, Run
from retentive.bench.workers.tasks import op_inputs, op_run, step_run
from retentive.ops import retention, retention_step
from retentive.ops.chunkwise import default_chunk_size
from retentive.ops.decay import log_decay

LARGEST_HEAD = 128  # dims, the most that attention kernels are made for


def prepare_op(case: Case) -> tuple[Answer, Run]:
    if case.get("attention"):
        return _attention(case)
    leaves = op_inputs(case, "tokens first")
    rates = log_decay(case["heads"]).float().to(case["device"])
    form, backend = case["retention"], case["backend"]

    def forward() -> Tensor:
        q, k, v = leaves
        return retention(q, k, v, rates, form=form, backend=backend)[0]

    facts: dict[str, Any] = {"version": __version__, "form": case["form"], "dtype": case["dtype"]}
    if form == "chunkwise" and backend != "reference":
        facts["chunk_size"] = _chunk_size(backend, leaves[0], leaves[2])
    return facts, op_run(forward, leaves, case["device"])


def _chunk_size(backend: str, q: Tensor, v: Tensor) -> int:
    if backend == "triton":
        from retentive.kernels.triton import chunkwise

        return chunkwise.default_chunk_size(v)
    return default_chunk_size(q, v)


def _attention(case: Case) -> tuple[Answer, Run]:
    """Attention of the same width: keys and values are as wide as q."""
    q, k, v = op_inputs({**case, **_heads(case)}, "heads first")

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    facts = {"version": torch.__version__, "form": _form(case, q, k, causal=True)}
    return {**facts, "dtype": case["dtype"]}, op_run(forward, [q, k, v], case["device"])


def prepare_step(case: Case) -> tuple[Answer, Run]:
    """One more token in each of `batch` rows, the state updated in place."""
    if case.get("attention"):
        return _attention_step(case)
    with torch.no_grad():
        q, k, v = (x.detach() for x in op_inputs({**case, "tokens": 1}, "tokens first"))
    sizes = (case["batch"], case["heads"], case["key_dim"], case["value_dim"])
    state = torch.randn(sizes, device=case["device"])
    rates = log_decay(case["heads"]).float().to(case["device"])
    facts = {"version": __version__, "form": "step, in place", "dtype": case["dtype"]}
    if case["backend"] == "torch":

        def step() -> object:
            return retention_step(q, k, v, rates, state, inplace=True)

        return facts, step_run(step, case["device"])
    from retentive.kernels.triton.decode import decode_step

    gate, gamma = torch.randn_like(v.flatten(2)), rates.exp().unsqueeze(-1)
    angles = torch.randn(case["batch"], 1, 1, case["key_dim"], device=case["device"])
    cos, sin = angles.cos(), angles.sin()
    ends = (None, None, None, "rmsnorm", "swish", 1e-6)

    def fused() -> object:
        return decode_step(q, k, v, gate, state, gamma, cos, sin, cos, sin, *ends)

    facts["form"] = "rotation, step, norm and gate"
    return facts, step_run(fused, case["device"])


def _attention_step(case: Case) -> tuple[Answer, Run]:
    """One query a row and head, behind `tokens` keys and values."""
    q, k, v = (x.detach() for x in op_inputs({**case, **_heads(case)}, "heads first"))
    q = q[:, :, :1].contiguous()

    def step() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    facts = {"version": torch.__version__, "form": _form(case, q, k, causal=False)}
    return {**facts, "dtype": case["dtype"]}, step_run(step, case["device"])


def _heads(case: Case) -> dict[str, int]:
    """The same width in heads of a size at which attention kernels are fast."""
    width = case["heads"] * case["key_dim"]
    K = case["key_dim"] if case["key_dim"] <= LARGEST_HEAD else LARGEST_HEAD
    heads = width // K if width % K == 0 else case["heads"]
    return {"heads": heads, "key_dim": width // heads, "value_dim": width // heads}


def _form(case: Case, q: Tensor, k: Tensor, *, causal: bool) -> str:
    """The form with the kernel that SDPA takes for such tensors, and the head dim."""
    return f"{case['form']}: {sdpa_kernel_of(q, k, causal=causal)}, head dim {q.shape[-1]}"


def sdpa_kernel_of(q: Tensor, k: Tensor, *, causal: bool) -> str:
    """flash_attention, cudnn_attention, efficient_attention or math, for such tensors."""
    shared = q.shape[1] != k.shape[1]
    choice = torch.ops.aten._fused_sdp_choice(q, k, k, is_causal=causal, enable_gqa=shared)
    return SDPBackend(choice).name.lower()
