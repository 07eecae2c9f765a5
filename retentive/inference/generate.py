"""`retentive.generate`: prompts in, continuations out."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from retentive.errors import InputError
from retentive.inference.sampling import Sampling
from retentive.inference.session import Piece, Session
from retentive.models.language_model import LanguageModel

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Prompts = TypeVar("Prompts", str, list[str])


def generate(
    model: LanguageModel,
    tokenizer: "Tokenizer",
    prompts: Prompts,
    *,
    max_new_tokens: int = 128,
    temperature: float = Sampling.temperature,
    top_k: int | None = Sampling.top_k,
    top_p: float = Sampling.top_p,
    min_p: float = Sampling.min_p,
    repetition_penalty: float = Sampling.repetition_penalty,
    seed: int = Sampling.seed,
    stop: str | Sequence[str] = (),
    on_text: Callable[[int, str], None] | None = None,
) -> Prompts:
    """How `model` goes on from a prompt (a string) or from several (a list), without the prompt.

    A text ends where the model ends it, before the first of the `stop` strings, or after
    `max_new_tokens`. `on_text(row, text)` gets each piece as soon as it is certain. The other
    options are those of `Sampling`; to save a text and go on with it, see `Session`.

    Raises InputError for options out of range, an empty prompt and another model's tokenizer.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; give 1 or more")
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    session = Session(model, tokenizer, sampling, [stop] if isinstance(stop, str) else stop)
    rows = [prompts] if isinstance(prompts, str) else prompts
    texts = [""] * len(rows)

    def take(pieces: list[Piece]) -> None:
        for row, text, _ in pieces:
            texts[row] += text
            if on_text and text:
                on_text(row, text)

    was_training = model.training
    model.eval()
    try:
        session.read(rows)
        for pieces in session.steps(max_new_tokens):
            take(pieces)
        take(session.held())
    finally:
        model.train(was_training)
    if isinstance(prompts, str):
        return texts[0]
    return texts
