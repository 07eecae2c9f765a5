"""The model that lm-eval sees, under the name `retentive`. Importing this module registers it.

Tokens are by lm-eval's own convention (`TemplateLM`): a request is tokenized as one text and cut
behind the context's tokens, spaces at the end of a context belong to the continuation, an empty
context is the token that texts begin with. So log-likelihoods are those of its `hf` model, but for
texts beyond that model's `max_length`: a state reads on.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from retentive.convert.loading import load, load_tokenizer
from retentive.data.tokenizer import TextTokenizer
from retentive.decoding.runner import runner
from retentive.devices import resolve_device
from retentive.errors import InputError
from retentive.eval.branches import Request, Scorer, after
from retentive.eval.progress import Display
from retentive.eval.results import Answers
from retentive.inference.text import TextStream
from retentive.models.language_model import LanguageModel

MOST_TOKENS = 256  # of a generation whose task does not say, as with lm-eval's other models

Scored = tuple[float, bool]  # log-likelihood, is it the greedy continuation?


class RetentiveLM(TemplateLM):
    """Any model of this library. What requests have in common is read once."""

    def __init__(
        self,
        pretrained: str | Path | LanguageModel,
        *,
        tokenizer: TextTokenizer | None = None,
        device: str = "auto",
        dtype: str = "float32",
        batch_size: int | str = 16,
        max_length: int | None = None,
        share: bool = True,
        answers: Answers | None = None,
    ):
        """`pretrained` is a model folder, or a model; then its `tokenizer` is needed.

        max_length: read only the last so many tokens, as lm-eval's `hf` does; else all of them.
        share: False reads every request by itself. answers: where finished requests are kept.
        """
        super().__init__()
        if not isinstance(pretrained, LanguageModel):
            folder = pretrained
            pretrained = load(folder, device=str(resolve_device(device)), dtype=dtype)
            tokenizer = tokenizer or TextTokenizer(
                load_tokenizer(folder), pretrained.config.vocab_size
            )
        assert tokenizer is not None
        self.model = pretrained
        self.text = tokenizer
        self.tokenizer: Any = tokenizer.tokenizer
        self.batch_size = 16 if batch_size == "auto" else int(batch_size)
        self.max_length = max_length
        self.answers = Answers() if answers is None else answers
        self._scorer = Scorer(self.model, self.batch_size, share=share)
        self._device = self.model.device

    @property
    def eot_token_id(self) -> int:
        return self.text.end

    @property
    def prefix_token_id(self) -> int:
        return self.text.begin

    @property
    def tokenizer_name(self) -> str:
        return "retentive"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        return self.text.encode(string, begin=add_special_tokens is not False)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Scored]:
        def answer(unfinished: list[Instance]) -> None:
            TemplateLM.loglikelihood(self, unfinished, disable_tqdm=True)

        found = self._answered("loglikelihood", requests, answer)
        return [(value, greedy) for value, greedy in found]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[Scored]:
        """Of (context, continuation) with the tokens of each."""
        scored = {
            self._request(pair, context, continuation): pair
            for pair, context, continuation in requests
        }

        def finish(request: Request) -> None:
            answer = (request.log_likelihood, request.greedy)
            self._finish("loglikelihood", scored[request], answer)

        self._scorer.finish(list(scored), on_finished=finish)
        return [(request.log_likelihood, request.greedy) for request in scored]

    def _request(
        self, pair: tuple[str, str], context: list[int], continuation: list[int]
    ) -> Request:
        if not continuation:
            raise InputError(
                f"a task asks how likely {pair[1]!r} is after {_end_of(pair[0])!r}, which is no"
                " token; its choices and targets must hold text"
            )
        if self.max_length is not None:
            room = self.max_length + 1 - len(continuation)
            if room < 1:
                raise InputError(
                    f"max_length is {self.max_length}, the continuation {_end_of(pair[1])!r} has"
                    f" {len(continuation)} tokens; give at least as many"
                )
            context = context[-room:]
        return Request(context, continuation)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts: a state needs no windows, unless `max_length` asks for them."""

        def answer(unfinished: list[Instance]) -> None:
            windows = {text: self._windows(text) for (text,) in (r.args for r in unfinished)}
            owner = {request: text for text, parts in windows.items() for request in parts}
            left = {text: len(parts) for text, parts in windows.items()}

            def finish(request: Request) -> None:
                text = owner[request]
                left[text] -= 1
                if not left[text]:
                    total = sum(part.log_likelihood for part in windows[text])
                    self._finish("loglikelihood_rolling", (text,), total)

            for text in (text for text, count in left.items() if not count):
                self._finish("loglikelihood_rolling", (text,), 0.0)
            self._scorer.finish(list(owner), on_finished=finish)

        return self._answered("loglikelihood_rolling", requests, answer)

    def _windows(self, text: str) -> list[Request]:
        tokens = self.tok_encode(text)
        windows = get_rolling_token_windows(
            tokens, self.prefix_token_id, self.max_length or max(1, len(tokens)), context_len=1
        )
        return [Request(*make_disjoint_window(window)) for window in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy, until a stop string of the task, the end of the text, or its number of tokens."""

        def answer(unfinished: list[Instance]) -> None:
            def group(request: Instance) -> str:
                return json.dumps(_pair(request)[1], sort_keys=True)

            for _, alike in groupby(sorted(unfinished, key=group), key=group):
                self._generate_all([_pair(request) for request in alike])

        return self._answered("generate_until", requests, answer)

    def _generate_all(self, requests: list[tuple[str, dict[str, Any]]]) -> None:
        """(context, options), the options all the same; the longest contexts first."""
        stop, most = _stop_and_length(requests[0][1])
        encoded = [(self.tok_encode(context), context, kwargs) for context, kwargs in requests]
        encoded.sort(key=lambda item: len(item[0]), reverse=True)
        for start in range(0, len(encoded), self.batch_size):
            batch = encoded[start : start + self.batch_size]
            room = None if self.max_length is None else max(1, self.max_length - most)
            contexts = [(tokens or [self.prefix_token_id]) for tokens, _, _ in batch]
            contexts = contexts if room is None else [tokens[-room:] for tokens in contexts]
            texts = self._generate(contexts, stop, most)
            for (_, context, kwargs), text in zip(batch, texts, strict=True):
                self._finish("generate_until", (context, kwargs), text)

    @torch.inference_mode()
    def _generate(self, contexts: list[list[int]], stop: list[str], most: int) -> list[str]:
        """Rows that have come to their end leave the batch."""
        state = self.model.init_state(len(contexts))
        decoding = runner(self.model, after(self.model, [c[:-1] for c in contexts], state))
        rows = [_Written(context[-1], TextStream(self.tokenizer, stop)) for context in contexts]
        going, words = list(rows), self.text.vocab_size
        for _ in range(most):
            last = torch.tensor([row.last for row in going], device=self.model.device)
            drawn = decoding.step(last)[:, :words].argmax(-1).tolist()
            for row, token in zip(going, drawn, strict=True):
                row.take(token, self.eot_token_id)
            places = [place for place, row in enumerate(going) if not row.ended]
            if not places:
                break
            if len(places) < len(going):
                decoding = runner(self.model, decoding.state.select(places))
                going = [going[place] for place in places]
        texts = (self.tokenizer.decode(row.tokens, skip_special_tokens=True) for row in rows)
        return [postprocess_generated_text(text, stop, None) for text in texts]

    def _answered(
        self, kind: str, requests: list[Instance], answer: Callable[[list[Instance]], None]
    ) -> list[Any]:
        """The answers to `requests`; `answer` is given those that have none yet, each once."""
        keys = [self._key(kind, request.args) for request in requests]
        unfinished = {
            key: request
            for key, request in zip(keys, requests, strict=True)
            if self.answers.get(key) is None
        }
        count = len(set(keys))
        with Display(count, "requests") as self._display:
            self._display.skip(count - len(unfinished))
            self._what = (requests[0].task_name if requests else None) or kind
            if unfinished:
                answer(list(unfinished.values()))
        return [self.answers.get(key) for key in keys]

    def _finish(self, kind: str, arguments: Sequence[Any], answer: Any) -> None:
        self.answers.add(self._key(kind, arguments), answer)
        self.cache_hook.add_partial(kind, arguments, answer)  # lm-eval's own, where it is asked for
        self._display.advance(1, self._what)

    def _key(self, kind: str, arguments: Sequence[Any]) -> str:
        return self.answers.key(kind, self.max_length, list(arguments))


@dataclass
class _Written:
    """A row of a generation; its stream only says when a stop string is complete."""

    last: int
    stream: TextStream
    tokens: list[int] = field(default_factory=list)
    ended: bool = False

    def take(self, token: int, end: int) -> None:
        self.last = token
        if token == end:
            self.ended = True
            return
        self.tokens.append(token)
        self.stream.push(token)
        self.ended = self.stream.stopped


register_model("retentive")(RetentiveLM)  # as a decorator it would hide the class's type


def _pair(request: Instance) -> tuple[str, dict[str, Any]]:
    """The context of a generation and its options."""
    arguments: Any = request.args
    return arguments[0], arguments[1]


def _stop_and_length(options: dict[str, Any]) -> tuple[list[str], int]:
    """Stop strings and the most tokens, of a task's `generation_kwargs`."""
    given: dict[str, Any] = dict(normalize_gen_kwargs(options, MOST_TOKENS))
    stop, most = given.pop("until"), given.pop("max_gen_toks")
    if given.pop("do_sample") or given.pop("num_beams", 1) != 1:
        raise InputError(
            f"a task wants other than greedy generation ({options}); set do_sample: false in its"
            " generation_kwargs"
        )
    if unknown := given.keys() - _NO_MATTER:
        raise InputError(
            f"a task's generation_kwargs hold {', '.join(sorted(unknown))}, which greedy generation"
            " here does not know; leave it out"
        )
    return [text for text in stop if text], most


_NO_MATTER = {"temperature", "top_k", "top_p", "min_p"}  # to greedy generation


def _end_of(text: str, width: int = 40) -> str:
    return text if len(text) <= width else f"...{text[-width:]}"
