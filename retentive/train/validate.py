"""How well a model predicts held-out text: nats a token, and bits per byte of the text itself."""

import math

import torch

from retentive.data.batches import NO_TARGET, BatchOrder
from retentive.data.dataset import Corpus
from retentive.models.language_model import LanguageModel
from retentive.train.trainer import autocast, batch_loss


@torch.no_grad()
def validate(
    model: LanguageModel,
    corpus: Corpus,
    *,
    batch_size: int,
    seq_len: int,
    dtype: torch.dtype,
    max_tokens: int | None = None,
    carry: bool = True,
) -> tuple[float, float]:
    """Nats a token and bits per byte over the held-out text, or about `max_tokens` of it.

    A model whose state has a fixed size carries it from row to row; documents that lie across two
    of the `batch_size` lanes (at most one a bound) are cut there, and their rest is read as a
    document of its own. One whose state grows (a Transformer) reads rows as it was trained on them,
    and so does any without `carry`: to compare the two. The same tokens come in the same order
    every time, each once.
    """
    split = corpus.valid
    seq_len = min(seq_len, split.num_tokens)
    rows = min(batch_size, split.num_tokens // seq_len)
    carries = carry and not model.state_grows
    order = BatchOrder(split, rows, seq_len, seed=0, carry=carries)
    state = model.init_state(rows) if carries else None
    token_bytes = torch.from_numpy(corpus.token_bytes)
    nats, tokens, text_bytes = 0.0, 0, 0
    was_training = model.training
    model.eval()
    try:
        for step in range(math.ceil(order.steps_per_epoch)):
            batch = order.batch(step)
            rows_left = round((order.steps_per_epoch - step) * rows)
            batch.targets[rows_left:] = NO_TARGET  # of the next epoch, which fills the batch up
            if state is not None:
                state = model.restart_rows(state, ~batch.continues)
            with autocast(model.device, dtype):
                loss, state = batch_loss(model, batch, state)
            targets = batch.targets[batch.targets != NO_TARGET]
            nats += loss.item()
            tokens += len(targets)
            text_bytes += int(token_bytes[targets].sum())
            if max_tokens is not None and tokens >= max_tokens:
                break
    finally:
        model.train(was_training)
    return nats / tokens, nats / math.log(2) / text_bytes
