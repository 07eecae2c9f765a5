"""Runs one public implementation's retention op for the benchmark, in a process of its own.

Started by path, with only that package and torch importable; imports nothing of ours. One JSON
request a line on stdin, one answer a line on stdout: {"prepare": case} builds the inputs, {"run":
true} times one forward and backward, and the answer carries the seconds of each.

q, k `[1,H,T,K]` and v `[1,H,T,V]` are handed over in the layout that each implementation works in.
"""

import json
import sys
import time
from types import SimpleNamespace

import torch


def yet_another_retnet(case, q, k, v):
    """The loop of its README, which slices a chunk at a time."""
    from yet_another_retnet.retention import (  # pyright: ignore[reportMissingImports]
        retention_chunkwise,
    )

    tokens, C = case["tokens"], case["chunk_size"]

    def run():
        outputs, state = [], None
        for start in range(0, tokens, C):
            piece = (x[:, :, start : start + C] for x in (q, k, v))
            o, state = retention_chunkwise(*piece, state)
            outputs.append(o)
        return torch.cat(outputs, dim=2)

    return run


def yet_another_retnet_split(case, q, k, v):
    """The same with all slices made at once, which spares it a backward pass of T²/C."""
    from yet_another_retnet.retention import (  # pyright: ignore[reportMissingImports]
        retention_chunkwise,
    )

    def run():
        outputs, state = [], None
        pieces = zip(*(x.split(case["chunk_size"], dim=2) for x in (q, k, v)), strict=True)
        for piece in pieces:
            o, state = retention_chunkwise(*piece, state)
            outputs.append(o)
        return torch.cat(outputs, dim=2)

    return run


def torchscale(case, q, k, v):
    from torchscale.component.multiscale_retention import (  # pyright: ignore[reportMissingImports]
        MultiScaleRetention,
    )

    C, heads = case["chunk_size"], case["heads"]
    layer = SimpleNamespace(num_heads=heads, key_dim=case["key_dim"], head_dim=case["value_dim"])
    # Its model builds these once a forward for all layers, so they are not timed.
    log_decay = torch.log1p(-torch.exp2(-5.0 - torch.arange(heads)))[:, None, None]
    n = torch.arange(C)
    mask = torch.exp(log_decay * (n[:, None] - n).clamp(min=0)).tril()
    until_end, scale = mask[:, -1:].transpose(1, 2), mask.sum(-1, keepdim=True).sqrt()
    total = until_end.sum(1, keepdim=True)
    from_start = torch.exp(log_decay * (n[:, None] + 1)) / scale * total
    inner = (mask / scale, torch.exp(log_decay * C), from_start, until_end / total)
    values = v.detach().transpose(1, 2).flatten(2).requires_grad_()

    def run():
        return MultiScaleRetention.chunk_recurrent_forward(layer, q, k, values, inner)

    return run


PEERS = {
    ("yet-another-retnet", "its README's loop"): yet_another_retnet,
    ("yet-another-retnet", "inputs split once"): yet_another_retnet_split,
    ("torchscale", "chunkwise"): torchscale,
}


def prepare(name, form, case):
    torch.set_num_threads(case["threads"])
    shape = (1, case["heads"], case["tokens"])
    q, k = (torch.randn(*shape, case["key_dim"]).requires_grad_() for _ in range(2))
    v = torch.randn(*shape, case["value_dim"]).requires_grad_()
    forward = PEERS[name, form](case, q, k, v)
    gradient = torch.randn_like(forward())

    def run():
        q.grad = k.grad = v.grad = None
        start = time.perf_counter()
        o = forward()
        middle = time.perf_counter()
        o.backward(gradient)
        return middle - start, time.perf_counter() - middle

    run()  # warm
    return run


def serve(name, form):
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "prepare" in request:
                run = prepare(name, form, request["prepare"])
                answer = {"torch": torch.__version__}
            else:
                forward, backward = run()  # of the case that was prepared last
                answer = {"forward": forward, "backward": backward}
        except Exception as error:  # any failure of a peer is a row of the table, not of the run
            answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
