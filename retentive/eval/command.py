"""`retentive eval WHAT`: one evaluation each, its options its own."""

import importlib
import os
from collections.abc import Sequence

from retentive.arguments import parse
from retentive.errors import InputError, nearest

EVALUATIONS = {  # name: (its options, in the module of this name beside run(options), help)
    "perplexity": ("PerplexityOptions", "loss on texts, and how it falls with context"),
    "tasks": ("TasksOptions", "the paper's tasks and others, through lm-eval"),
    "recall": ("RecallOptions", "what is remembered, over the distance to it"),
}


def main(argv: Sequence[str]) -> int | None:
    what, *rest = argv or ["--help"]
    if what in ("-h", "--help"):
        lines = [f"  {name:10}  {text}" for name, (_, text) in EVALUATIONS.items()]
        print("\n".join(["usage: retentive eval WHAT MODEL [OPTIONS]", "", *lines]))
        return 0
    if what not in EVALUATIONS:
        near = nearest(what, EVALUATIONS)
        raise InputError(f"unknown evaluation {what!r}{near}; choose {', '.join(EVALUATIONS)}")
    options, description = EVALUATIONS[what]
    # lm-eval's bars, ours stand instead; here because it is read when torch imports tqdm.
    os.environ.setdefault("TQDM_DISABLE", "1")
    module = importlib.import_module(f"retentive.eval.{what}")
    return module.run(parse(getattr(module, options), rest, f"retentive eval {what}", description))
