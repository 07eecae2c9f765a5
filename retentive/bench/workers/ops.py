"""The op alone: ours in every form and backend, and attention at the same width."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from retentive import __version__
from retentive.bench.workers.serving import Answer, Case, Run
from retentive.bench.workers.tasks import op_inputs, op_run
from retentive.ops import retention
from retentive.ops.chunkwise import default_chunk_size
from retentive.ops.decay import log_decay


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
        facts["chunk_size"] = default_chunk_size(leaves[0], leaves[2])
    return facts, op_run(forward, leaves, case["device"])


def _attention(case: Case) -> tuple[Answer, Run]:
    """What a Transformer has in retention's place: heads of K dims for keys and values alike."""
    import torch

    q, k, v = op_inputs({**case, "value_dim": case["key_dim"]}, "heads first")

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    facts = {"version": torch.__version__, "form": case["form"], "dtype": case["dtype"]}
    return facts, op_run(forward, [q, k, v], case["device"])
