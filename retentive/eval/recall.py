"""`retentive eval recall`: is something still known after so many tokens?

Two probes made by code, at distances that double, each asked in the middle of one text: the state
is copied, the copy is asked, the text goes on. So all distances cost one reading of the longest, in
memory that does not grow.

- passkey (Mohtashami and Jaggi 2023, §4.2): a number said in a sentence, then other sentences, then
  the question for the number.
- mqar, multi-query associative recall (Arora et al. 2023, "Zoology"): pairs of random tokens, then
  other random tokens, then each first of a pair, after which the second is expected.

The answer that counts is the likeliest of the candidates: the model's own loss on numbers or random
tokens matters less so. How far a head can remember is its half-life, shown beside.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from retentive.data.tokenizer import TextTokenizer
from retentive.errors import InputError, nearest
from retentive.eval.branches import Request, Scorer, after
from retentive.eval.options import Options, check_least, open_model, open_results
from retentive.eval.progress import Display
from retentive.eval.recall_report import Answer, Report
from retentive.eval.results import Results
from retentive.models.counts import half_lives
from retentive.models.language_model import LanguageModel
from retentive.models.state import ModelState

PROBES = ("passkey", "mqar")
FORMAT = 1  # counts up when the same seed would give other texts
NEAREST = 64  # tokens
PASSKEYS = 10  # candidates


@dataclass(frozen=True)
class RecallOptions(Options):
    probes: tuple[str, ...] = PROBES
    """Which: passkey, mqar."""
    max_distance: int = 65536
    """The farthest; the others are 64 and its doublings below this."""
    samples: int = 32
    """Texts of each probe."""
    pairs: int = 8
    """Of a text of mqar, each asked for; chance is 1 in so many."""
    seed: int = 0
    """The texts are the same for the same seed."""

    def check(self) -> None:
        super().check()
        for name in ("samples", "max_distance"):
            check_least(name, getattr(self, name))
        check_least("pairs", self.pairs, 2)
        for probe in self.probes:
            if probe not in PROBES:
                raise InputError(
                    f"unknown probe {probe!r}{nearest(probe, PROBES)}; choose {', '.join(PROBES)}"
                )
        if not self.probes:
            raise InputError(f"--probes is empty; choose {', '.join(PROBES)}")

    @property
    def distances(self) -> list[int]:
        doublings = [NEAREST << n for n in range(self.max_distance.bit_length())]
        return [d for d in doublings if d < self.max_distance] + [self.max_distance]


@dataclass(frozen=True)
class Question:
    """Which of `candidates` comes after `context`?"""

    context: list[int]
    candidates: list[list[int]]
    right: int


@dataclass(frozen=True)
class Sample:
    """A text: what is to be remembered, what comes after, and what is asked in between."""

    told: list[int]
    filler: list[int]
    questions: list[Question]


class Probe(Protocol):
    def sample(self, dice: random.Random, distance: int) -> Sample:
        """With `distance` tokens of filler."""
        ...


_SUBJECTS = "The river,The road,A window,The garden,His brother,The lamp,An old tree,The letter"
_VERBS = "was near,stood behind,came before,belonged to,looked like,was older than,lay beside"
_OBJECTS = "the house,a green hill,the station,my neighbour,the small bridge,a wall,the market"


@dataclass(frozen=True)
class Passkey:
    tokenizer: TextTokenizer

    def sample(self, dice: random.Random, distance: int) -> Sample:
        keys = [f" {dice.randrange(10_000, 100_000)}" for _ in range(PASSKEYS)]
        right = dice.randrange(PASSKEYS)
        told = f"There is a pass key in this text. The pass key is{keys[right]}. Remember it.\n"
        filler: list[int] = []
        while len(filler) < distance:
            filler += self._encode("".join(self._sentence(dice) for _ in range(64)))
        question = Question(
            self._encode("\nWhat is the pass key? The pass key is"),
            [self._encode(key) for key in keys],
            right,
        )
        return Sample([self.tokenizer.begin, *self._encode(told)], filler[:distance], [question])

    def _sentence(self, dice: random.Random) -> str:
        words = (dice.choice(part.split(",")) for part in (_SUBJECTS, _VERBS, _OBJECTS))
        return " ".join(words) + ". "

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, begin=False)


class Mqar:
    def __init__(self, tokenizer: TextTokenizer, pairs: int):
        """InputError for more pairs than the vocabulary allows."""
        added = tokenizer.tokenizer.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special}
        self.words = sorted(set(range(tokenizer.vocab_size)) - special)
        self.begin, self.pairs = tokenizer.begin, pairs
        if len(self.words) < 2 * pairs + 1:
            raise InputError(
                f"--pairs is {pairs}, for which the vocabulary of {len(self.words)} is too small;"
                f" give at most {(len(self.words) - 1) // 2}"
            )

    def sample(self, dice: random.Random, distance: int) -> Sample:
        words = dice.sample(self.words, len(self.words))
        keys, values = words[: self.pairs], words[self.pairs : 2 * self.pairs]
        told = [token for pair in zip(keys, values, strict=True) for token in pair]
        filler = dice.choices(words[2 * self.pairs :], k=distance)
        candidates = [[value] for value in values]
        questions = [Question([key], candidates, n) for n, key in enumerate(keys)]
        return Sample([self.begin, *told], filler, questions)


def run(options: RecallOptions) -> None:
    """Raises InputError for what the options and the model refuse."""
    options.check()
    model, tokenizer = open_model(options)
    made: dict[str, Callable[[], Probe]] = {
        "passkey": lambda: Passkey(tokenizer),
        "mqar": lambda: Mqar(tokenizer, options.pairs),
    }
    probes = {name: made[name]() for name in dict.fromkeys(options.probes)}
    distances = options.distances
    report = Report(
        model=str(options.model),
        dtype=options.dtype,
        samples=options.samples,
        pairs=options.pairs,
        seed=options.seed,
        distances=distances,
        half_lives=half_lives(model.config),
        chances={"passkey": 1 / PASSKEYS, "mqar": 1 / options.pairs},
    )
    total = len(probes) * options.samples * distances[-1]
    with (
        open_results(options, model, tokenizer) as results,
        Display(total, "tokens") as display,
    ):
        for name, probe in probes.items():
            report.answers[name] = measure(model, name, probe, options, distances, results, display)
        results.save("recall", report.to_dict())
        report.draw(results.folder)
    report.show(results.folder)


def measure(
    model: LanguageModel,
    name: str,
    probe: Probe,
    options: RecallOptions,
    distances: Sequence[int],
    results: Results,
    display: Display,
) -> list[list[Answer]]:
    """An answer for each sample and distance; finished samples are not read again."""
    shape = options.pairs if name == "mqar" else PASSKEYS
    keys = [
        results.key("recall", FORMAT, name, shape, options.seed, number, distances)
        for number in range(options.samples)
    ]
    answers = {number: results.get(key) for number, key in enumerate(keys)}
    missing = [number for number, answer in answers.items() if answer is None]
    display.skip((options.samples - len(missing)) * distances[-1])
    for start in range(0, len(missing), options.batch_size):
        numbers = missing[start : start + options.batch_size]
        samples = [
            probe.sample(random.Random(f"{name} {options.seed} {n}"), distances[-1])
            for n in numbers
        ]
        found = ask_along(
            model,
            samples,
            distances,
            options.batch_size,
            lambda tokens: display.advance(tokens, name),
        )
        for number, answer in zip(numbers, found, strict=True):
            answers[number] = answer
            results.add(keys[number], answer)
    return [[Answer(*part) for part in answers[number]] for number in range(options.samples)]


def ask_along(
    model: LanguageModel,
    samples: Sequence[Sample],
    distances: Sequence[int],
    batch_size: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[list[Answer]]:
    """Each sample's answers by distance. The samples are rows, read side by side once."""
    scorer = Scorer(model, batch_size)
    state = after(model, [sample.told for sample in samples], model.init_state(len(samples)))
    by_distance, at = [], 0
    for distance in distances:
        state = after(model, [sample.filler[at:distance] for sample in samples], state)
        by_distance.append(_ask(scorer, samples, state))
        advance((distance - at) * len(samples))
        at = distance
    return [list(answers) for answers in zip(*by_distance, strict=True)]


def _ask(scorer: Scorer, samples: Sequence[Sample], state: ModelState) -> list[Answer]:
    """What each row of the state, which stays as it is, answers to its sample's questions."""
    requests = [
        [
            [Request(question.context, candidate, row) for candidate in question.candidates]
            for question in sample.questions
        ]
        for row, sample in enumerate(samples)
    ]
    scorer.finish([r for sample in requests for question in sample for r in question], state)
    return [
        Answer.of(
            [
                ([r.log_likelihood for r in asked], asked[question.right].greedy, question.right)
                for asked, question in zip(row, sample.questions, strict=True)
            ]
        )
        for row, sample in zip(requests, samples, strict=True)
    ]
