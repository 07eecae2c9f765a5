"""Each mistake in a call of the op is one line that says what was given and what is allowed."""

import pytest
import torch

from retentive.errors import InputError
from retentive.ops import retention, retention_step
from retentive.ops.decay import log_decay

B, T, H, K, V = 2, 5, 3, 4, 6
Q, VALUES, STATE = torch.randn(B, T, H, K), torch.randn(B, T, H, V), torch.randn(B, H, K, V)
PACKED = {"q": Q[:1], "k": Q[:1], "v": VALUES[:1]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": Q[0]}, r"q and k must be \[B,T,H,K\]"),
        ({"k": Q[:, :4]}, "q and k must be"),
        ({"v": VALUES[:1]}, "q and k must be"),
        ({"q": Q[:, :0], "k": Q[:, :0], "v": VALUES[:, :0]}, "at least one"),
        ({"q": Q.double()}, "share one dtype of float64, float32, bfloat16, float16"),
        ({"q": Q.int(), "k": Q.int(), "v": VALUES.int()}, "share one dtype"),
        ({"v": VALUES.to("meta")}, "on one device"),
        ({"log_decay": log_decay(2)}, r"\[H\] = \[3\]"),
        ({"log_decay": torch.zeros(B, T, H)}, "gated retention"),
        ({"log_decay": torch.tensor([-0.1, 0.2, 0.0])}, "must be ≤ 0"),
        ({"log_decay": log_decay(3).requires_grad_()}, "no gradient"),
        ({"state": STATE[:1]}, r"state must be float32 \[N,H,K,V\] = \[2, 3, 4, 6\]"),
        ({"state": STATE.double()}, "state must be float32"),
        ({"form": "chunked"}, "did you mean 'chunkwise'"),
        ({"backend": "trito"}, "did you mean 'triton'.* choose auto or one of torch, reference"),
        ({"form": "recurrent", "chunk_size": 4}, "belongs to the chunkwise form"),
        ({"chunk_size": 0}, "whole number ≥ 1"),
        ({"chunk_size": 2.0}, "whole number ≥ 1"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "B must be 1, got 2"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, "int32 or int64"),
        ({**PACKED, "cu_seqlens": torch.tensor([0, 4])}, "rise from 0 to T = 5, got 0 … 4"),
        ({**PACKED, "cu_seqlens": torch.tensor([0, 4, 3, 5])}, "not in order"),
        ({**PACKED, "cu_seqlens": torch.tensor([0, 5]), "state": STATE}, r"= \[1, 3, 4, 6\]"),
    ],
)
def test_retention_refuses(change, words):
    arguments = {"q": Q, "k": Q, "v": VALUES, "log_decay": log_decay(H), **change}
    with pytest.raises(InputError, match=words) as raised:
        retention(**arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"active": torch.ones(B)}, "active must be bool"),
        ({"active": torch.ones(3, dtype=torch.bool)}, "active must be bool"),
        ({"state": STATE.clone().requires_grad_(), "inplace": True}, "use inplace=False"),
        ({"state": STATE[:, :, :2]}, "state must be"),
    ],
)
def test_retention_step_refuses(change, words):
    arguments = {"q": Q, "k": Q, "v": VALUES, "log_decay": log_decay(H), "state": STATE, **change}
    with pytest.raises(InputError, match=words):
        retention_step(**arguments)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, r"need a CUDA device and the tensors are on cpu .*; choose auto or one of torch, ref"),
        ({"interpret": "1", "form": "parallel"}, "has the chunkwise form, not the parallel one"),
        ({"interpret": "1", "K": 8}, "takes K from 16 to 256 and V from 16 to 512, got K 8 and V"),
        ({"interpret": "1", "V": 520}, "K 16 and V 520"),
        ({"interpret": "1", "dtype": torch.float64}, "computes in float32, the inputs are float64"),
        ({"interpret": "1", "chunk_size": 100}, "a multiple of 64 up to 4096, got 100"),
    ],
)
def test_triton_tells_why_not(change, words, monkeypatch):
    call = {"K": 16, "V": 16, "dtype": torch.float32, "form": "chunkwise", **change}
    monkeypatch.setenv("TRITON_INTERPRET", call.pop("interpret", "0"))
    q, v = (torch.randn(1, T, 1, call.pop(x)).to(call["dtype"]) for x in ("K", "V"))
    call.pop("dtype")
    with pytest.raises(InputError, match=words) as raised:
        retention(q, q, v, log_decay(1), backend="triton", **call)
    assert "\n" not in str(raised.value)
