"""Log-likelihoods of given tokens; logits exist for a few hidden states at a time.

Shapes: N hidden states, D width, M targets; several targets may follow one hidden state.
"""

import torch
from torch import Tensor

from retentive.layers.loss import chunk_rows
from retentive.models.language_model import LanguageModel


@torch.inference_mode()
def log_likelihoods(
    model: LanguageModel, h: Tensor, places: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """log p of `targets[m]` after the token of `h[places[m]]`; is it the likeliest?

    h `[N,D]`, places and targets int64 `[M]`. Returns `[M]` in float32 (float64 of a float64 model)
    and bool `[M]`.
    """
    used, place = places.unique(return_inverse=True)
    found = torch.empty(len(targets), dtype=model.exact_dtype, device=h.device)
    likeliest = torch.empty(len(targets), dtype=torch.bool, device=h.device)
    rows = chunk_rows(model.config.vocab_size, h.device)
    for start in range(0, len(used), rows):
        log_p = model.head(h[used[start : start + rows]]).log_softmax(-1, dtype=model.exact_dtype)
        mine = (place >= start) & (place < start + rows)
        row, target = place[mine] - start, targets[mine]
        found[mine] = log_p[row, target]
        likeliest[mine] = log_p.argmax(-1)[row] == target
    return found, likeliest
