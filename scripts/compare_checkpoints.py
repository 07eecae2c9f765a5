"""How far logits are from those of the code that a checkpoint was made with: a table.

    python scripts/compare_checkpoints.py tests/convert/golden/*

Each folder holds a checkpoint as its code saves it, and golden.safetensors with that code's logits,
in float64 (`docs/checkpoints.md`).
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import retentive

FORMS = ("parallel", "chunkwise", "recurrent")


def logits(model: Any, tokens: Tensor, form: str) -> Tensor:
    """Of tokens `[B,T]`, read at once, or token by token with the state where it is recurrent."""
    model.set_kernels(form=form, chunk_size=16 if form == "chunkwise" else None)
    if form != "recurrent":
        return model(tokens)[0]
    state, steps = None, []
    for token in tokens.split(1, dim=1):
        step, state = model(token, state)
        steps.append(step)
    return torch.cat(steps, 1)


def cases(folder: Path) -> list[tuple[Tensor, Tensor]]:
    """Tokens, and what the original gives for them.

    Of code that has a recurrent form that of it: some of its parallel forms also divide by a sum
    over the whole row, which no recurrence can have.
    """
    golden = load_file(folder / "golden.safetensors")
    name = "logits_recurrent_f64" if "logits_recurrent_f64" in golden else "logits_f64"
    found = [(golden["input_ids"], golden[name])]
    if "input_ids_long" in golden:
        found.append((golden["input_ids_long"], golden["logits_long_f64"]))
    return found


@torch.no_grad()
def difference(model: Any, folder: Path, form: str) -> float:
    """The largest of all logits."""
    return max(
        float((logits(model, tokens, form) - expected).abs().max())
        for tokens, expected in cases(folder)
    )


def main(folders: list[str]) -> None:
    print("| checkpoint | " + " | ".join(FORMS) + " | float64, worst |")
    print("|---|" + "---|" * (len(FORMS) + 1))
    for folder in map(Path, folders):
        single, double = (retentive.load(folder, dtype=dtype) for dtype in ("float32", "float64"))
        found = [difference(single, folder, form) for form in FORMS]
        found.append(max(difference(double, folder, form) for form in FORMS))
        print(f"| {folder.name} | {' | '.join(f'{x:.0e}' for x in found)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
