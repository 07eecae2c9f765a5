"""A RetNet as two graphs that run without this package: a step of one token, and a prefill.

Both are traced from the model by torch.export and take its weights as an argument, so that there is
one copy of them, whatever the format. Legend: B rows, T tokens, L layers, H heads, K and V head
dims.
"""

import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.func import functional_call

from retentive import __version__
from retentive.compress.export_formats import FORMATS, Format, Run
from retentive.data.tokenizer import TextTokenizer, save_tokenizer
from retentive.errors import InputError, nearest
from retentive.io.atomic import write_text
from retentive.io.folders import check_new, new_folder
from retentive.mixers.state import TensorState
from retentive.models.build import empty_model
from retentive.models.checkpoint import WEIGHTS, save_model
from retentive.models.language_model import LanguageModel
from retentive.models.state import ModelState

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DESCRIPTION = "export.json"
PIECE = 256
"""Tokens that a prefill reads at once: its retention is parallel, work and memory are as T²."""
TOLERANCE = 1e-5  # for every 8 layers: rounding adds up
GRAPHS = {  # name: form and backend of its retention, such that all of it is plain operations
    "step": ("recurrent", "torch"),
    "prefill": ("parallel", "reference"),
}


class Errors(NamedTuple):
    """Relative L2 distance from the model, of the typical (median) row; the worst call's.

    Not of all rows together: where retention cancels to almost nothing, the head norm blows the
    rounding of any float32 program up, the model's own too, and such a row would drown the rest.
    """

    logits: float
    state: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.logits <= self.allowed and self.state <= self.allowed  # NaN is not


def check_format(name: str) -> Format:
    """The format of that name. InputError where it is unknown or its packages are missing."""
    if name not in FORMATS:
        near = nearest(name, FORMATS)
        raise InputError(f"unknown format {name!r}{near}; choose {' or '.join(FORMATS)}")
    if missing := [package for package in FORMATS[name].packages if find_spec(package) is None]:
        raise InputError(
            f"the format {name} needs {', '.join(missing)}:"
            ' pip install "retentive[export]", or choose torch-export'
        )
    return FORMATS[name]


def export(
    model: LanguageModel, out: str | Path, format: str, tokenizer: "Tokenizer | None" = None
) -> Errors:
    """Write the folder `out`: both graphs, what they are (export.json), and the model itself.

    The graphs are read back and compared with the model before the folder gets its name.
    Returns by how much they differ. Raises InputError, and writes nothing, where `out` exists, the
    model is no RetNet in float32, or they differ by more than rounding explains.
    """
    out, kind = Path(out), check_format(format)
    check_new(out)
    retnet = _plain(model)
    texts = None if tokenizer is None else TextTokenizer(tokenizer, model.config.vocab_size)
    with new_folder(out) as folder, torch.no_grad():
        save_model(retnet, folder)
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
        names = [f"state.{i}" for i in range(len(retnet.layers))]
        for graph in GRAPHS:
            kind.write(trace(retnet, graph), folder / f"{graph}{kind.suffix}", names)
        about = describe(retnet, format, texts)
        write_text(folder / DESCRIPTION, json.dumps(about, indent=2) + "\n")
        errors = check(retnet, lambda graph: kind.open(folder, graph))
        if not errors.passed:
            raise InputError(
                f"the graphs differ from the model by {errors.logits:.1e} in the logits and"
                f" {errors.state:.1e} in the state, more than {errors.allowed:.0e}: {out} is not"
                " written; try other versions of torch and onnxruntime, or the other format"
            )
    return errors


class Stateful(nn.Module):
    """Tokens `[B,T]`, positions `[B]`, L states `[B,H,K,V]` -> logits `[B,vocab]`, the next two.

    The logits are those of the last token; the next positions and states are what goes with the
    tokens after it.
    """

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model = model

    def forward(
        self, tokens: Tensor, positions: Tensor, state: list[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        before = ModelState(positions, [TensorState("retention", {"S": S}) for S in state])
        h, after = self.model.hidden(tokens, before)
        assert after is not None
        logits = self.model.head(h[:, -1])
        return logits, after.positions, _S(after)


class Stateless(nn.Module):
    """The same, its first argument the weights of the model by name."""

    def __init__(self, model: LanguageModel):
        super().__init__()
        self._inner = (Stateful(model),)  # in a tuple, so that it has no parameters of its own

    def forward(
        self, weights: dict[str, Tensor], tokens: Tensor, positions: Tensor, state: list[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        given = {f"model.{name}": weight for name, weight in weights.items()}
        return functional_call(self._inner[0], given, (tokens, positions, state))


def trace(model: LanguageModel, graph: str) -> ExportedProgram:
    """`Stateless` of the model for any number of rows, in a prefill also of tokens."""
    form, backend = GRAPHS[graph]
    twin = empty_model(model.config).set_kernels(form=form, backend=backend).eval()
    weights = dict(sorted(model.state_dict().items()))
    before = model.init_state(2)
    tokens = torch.zeros(2, 1 if graph == "step" else 3, dtype=torch.int64)
    state = _S(before)
    batch = Dim("batch")
    shapes = {
        "weights": dict.fromkeys(weights),
        "tokens": {0: batch} if graph == "step" else {0: batch, 1: Dim("length")},
        "positions": {0: batch},
        "state": [{0: batch}] * len(state),
    }
    arguments = (weights, tokens, before.positions, state)
    program = torch.export.export(Stateless(twin), arguments, dynamic_shapes=shapes)
    program.example_inputs = None  # would be saved, weights and all
    for part in program.graph_module.modules():
        for node in getattr(part, "graph", torch.fx.Graph()).nodes:
            node.meta.pop("stack_trace", None)  # where the package lies on this machine
    return program


def describe(model: LanguageModel, format: str, texts: TextTokenizer | None) -> dict[str, Any]:
    """What a program needs to run the graphs, as JSON. In a step "length" is 1."""
    sizes = model.blocks[0].mixer.state_shape
    layers = range(len(model.layers))
    state = {"dtype": "float32", "shape": ["batch", *sizes]}
    positions = {"dtype": "int64", "shape": ["batch"]}
    return {
        "made_by": f"retentive {__version__}",
        "format": format,
        "graphs": {graph: f"{graph}{FORMATS[format].suffix}" for graph in GRAPHS},
        "weights": WEIGHTS,
        "piece": PIECE,
        "begin_tokens": [] if texts is None else texts.before,
        "end_token": None if texts is None else texts.end,
        "inputs": {
            "tokens": {"dtype": "int64", "shape": ["batch", "length"]},
            "positions": positions,
            **{f"state.{i}": state for i in layers},
        },
        "outputs": {
            "logits": {"dtype": "float32", "shape": ["batch", model.config.vocab_size]},
            "next_positions": positions,
            **{f"next_state.{i}": state for i in layers},
        },
    }


class Call(NamedTuple):
    """A call of a graph, and what the model makes of it."""

    graph: str
    tokens: Tensor
    before: ModelState
    logits: Tensor
    after: ModelState


def check(model: LanguageModel, open_graph: Callable[[str], Run], rows: int = 3) -> Errors:
    """The graphs beside the model on random tokens: from the start, and around position 10^6."""
    calls, errors = list(_calls(model, rows)), []
    for graph in GRAPHS:
        run = open_graph(graph)  # one after the other: each may hold a copy of the weights
        for call in (call for call in calls if call.graph == graph):
            logits, positions, layers = run(call.tokens, call.before.positions, _S(call.before))
            same = torch.equal(positions, call.after.positions)
            found = _distance(logits, call.logits), _distance(_cat(layers), _cat(_S(call.after)))
            errors.append(found if same else (torch.inf, torch.inf))
        del run
    logits, state = torch.tensor(errors).amax(dim=0).tolist()  # NaN where any is
    return Errors(logits, state, TOLERANCE * max(1.0, len(model.layers) / 8))


def _calls(model: LanguageModel, rows: int) -> Iterator[Call]:
    generator = torch.Generator().manual_seed(0)
    state = model.init_state(rows)
    for graph, length, skipped in (
        ("prefill", 48, 0),
        ("step", 1, 0),
        ("prefill", 16, 10**6),
        ("step", 1, 0),
    ):
        tokens = torch.randint(model.config.vocab_size, (rows, length), generator=generator)
        before = ModelState(state.positions + skipped, state.layers)
        h, after = model.hidden(tokens, before)
        assert after is not None
        yield Call(graph, tokens, before, model.head(h[:, -1]), after)
        state = after


def _S(state: ModelState) -> list[Tensor]:
    return [layer["S"] for layer in state.layers]


def _cat(layers: list[Tensor]) -> Tensor:
    return torch.cat(layers, dim=1)


def _distance(given: Tensor, expected: Tensor) -> float:
    """Relative L2 of the median row."""
    given, expected = given.double().flatten(1), expected.double().flatten(1)
    return float(((given - expected).norm(dim=1) / expected.norm(dim=1)).median())


def _plain(model: LanguageModel) -> LanguageModel:
    """Another model of the same weights: for inference, on the CPU, with the default forms."""
    for index, block in enumerate(model.blocks):
        if not block.mixer.exportable:
            raise InputError(
                f"layer {index} mixes by {block.mixer.describe()}, which is not exported;"
                " models of retention without xPos are"
            )
    model.check_storable()
    kinds = {str(weight.dtype).removeprefix("torch.") for weight in model.state_dict().values()}
    if kinds != {"float32"}:
        raise InputError(
            f"the weights are {', '.join(sorted(kinds))}; give the model in float32,"
            " the one that a quantised model was made from"
        )
    plain = empty_model(model.config)
    weights = {name: weight.cpu() for name, weight in model.state_dict().items()}
    plain.load_state_dict(weights, assign=True)
    return plain.eval()
