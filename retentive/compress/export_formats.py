"""A traced graph as a file, and back: ONNX, and torch.export's own format.

The weights are not in these files but in the `model.safetensors` beside them.
"""

import io
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from retentive.io.tensors import read_tensors
from retentive.models.checkpoint import WEIGHTS

Run = Callable[[Tensor, Tensor, list[Tensor]], tuple[Tensor, Tensor, list[Tensor]]]
"""tokens, positions, state -> logits, next positions, next state."""


@dataclass(frozen=True)
class Format:
    suffix: str
    packages: tuple[str, ...]
    write: Callable[[ExportedProgram, Path, Sequence[str]], None]
    """The program, the file, and what the tensors of the state are called."""
    open: Callable[[Path, str], Run]
    """The folder and the name of a graph in it."""


def _write_onnx(program: ExportedProgram, path: Path, state: Sequence[str]) -> None:
    import onnx_ir as ir

    places = _places(path.with_name(WEIGHTS))
    weights = sorted(places)  # as `trace` orders them
    inputs, outputs = ["tokens", "positions", *state], ["logits", "next_positions"]
    outputs += [f"next_{name}" for name in state]
    with _quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=[*weights, *inputs],
            output_names=outputs,
            custom_translation_table={torch.ops.aten.cos.default: _cosine},
        )
    assert exported is not None
    graph = exported.model.graph
    for value in list(graph.inputs)[: len(weights)]:
        assert value.name is not None and value.shape is not None and value.dtype is not None
        offset, length = places[value.name]
        value.const_value = ir.ExternalTensor(
            WEIGHTS, offset, length, value.dtype, shape=value.shape, name=value.name
        )
        graph.inputs.remove(value)
        graph.register_initializer(value)
    for node in graph.all_nodes():
        node.metadata_props.clear()  # where in the model's source it comes from
    _name_dims(graph)
    ir.save(exported.model, path)


def _cosine(angles: Any) -> Any:
    """cos x = sin(x + π/2): not every onnxruntime has a cosine in float64, as angles need it."""
    import onnx_ir as ir
    from onnxscript import opset18

    op: Any = opset18  # typed for tensors, not for the values of a graph
    return op.Sin(op.Add(angles, op.Constant(value=ir.tensor(math.pi / 2, ir.DataType.DOUBLE))))


def _name_dims(graph: Any) -> None:
    """The exporter's own names of sizes, such as s27, as batch and length."""
    import onnx_ir as ir

    tokens = graph.inputs[0].shape
    names = {str(tokens[0]): "batch", str(tokens[1]): "length"}
    for value in (*graph.inputs, *graph.outputs):
        dims = (dim if isinstance(dim, int) else names[str(dim)] for dim in value.shape)
        value.shape = ir.Shape(dims)


def _open_onnx(folder: Path, graph: str) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(
        folder / f"{graph}.onnx", providers=["CPUExecutionProvider"]
    )
    names = [given.name for given in session.get_inputs()]

    def run(
        tokens: Tensor, positions: Tensor, state: list[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        arrays = (x.numpy() for x in (tokens, positions, *state))
        results = session.run(None, dict(zip(names, arrays, strict=True)))
        logits, after, *layers = (torch.from_numpy(x) for x in results)
        return logits, after, layers

    return run


def _places(path: Path) -> dict[str, tuple[int, int]]:
    """Name -> offset and length in bytes, of the tensors in a safetensors file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    spans = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: (8 + size + start, stop - start) for name, (start, stop) in spans.items()}


def _write_torch(program: ExportedProgram, path: Path, state: Sequence[str]) -> None:
    held = io.BytesIO()  # torch reports a full disk as an error of its own kind
    with _quiet():
        torch.export.save(program, held)
    path.write_bytes(held.getbuffer())


def _open_torch(folder: Path, graph: str) -> Run:
    with _quiet():
        module = torch.export.load(folder / f"{graph}.pt2").module()
    weights, _ = read_tensors(folder / WEIGHTS, "weights")
    return lambda tokens, positions, state: module(weights, tokens, positions, state)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say of themselves and of packages that are not needed here."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


FORMATS = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _open_onnx),
    "torch-export": Format(".pt2", (), _write_torch, _open_torch),
}
