"""A few tokens of a model as a program: a decoding step, a short prompt.

The program is written once for a batch, by a walk through the model: each of its parts writes its
own instructions (`emit`). Weights stay the model's own.

Shapes: B sequences, T tokens of each, M = B·T rows, D width, H heads, K head dim.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from retentive.decoding.program import Program, Rows
from retentive.decoding.recurrent import AHEAD, LayoutsAhead, Runner
from retentive.errors import InputError
from retentive.kernels.cpu.available import available
from retentive.layers.feed_forward import FeedForward
from retentive.layers.layout import AnglesByKey
from retentive.layers.linear import Linear
from retentive.layers.norms import RMSNorm
from retentive.layers.parts import Repeated, Scaled
from retentive.layers.quantized import QuantizedEmbedding, QuantizedLinear
from retentive.layers.rotation import Angles, Constant, Rotation
from retentive.mixers.base import Mixer
from retentive.mixers.xpos import XPosRetention
from retentive.models.block import RESIDUALS, Block
from retentive.models.language_model import LanguageModel
from retentive.models.state import ModelState

PARTS = {
    nn.ModuleList, nn.Dropout, Scaled, Linear, QuantizedLinear, nn.Embedding, QuantizedEmbedding,
    nn.LayerNorm, RMSNorm, Rotation, XPosRetention, Constant, Repeated, *RESIDUALS.values(),
}  # fmt: skip
"""The modules that instructions or the parts around them know. An adapter's are of other types."""

FEW = {32: 32, 16: 32, 8: 128, 4: 256}
"""By the bits of a weight: for more tokens the chunkwise form and dense products are faster."""


def suits(model: LanguageModel) -> bool:
    """Whether a step of this model can be a program."""
    return (
        model.device.type == "cpu"
        and model.dtype in (torch.float32, torch.bfloat16)
        and available()
        and all(_known(part) for part in model.modules() if part is not model)
        and all(_readable(tensor) for tensor in (*model.parameters(), *model.buffers()))
    )


def _known(part: nn.Module) -> bool:
    """Whether a program computes what the module does, and nobody changed that."""
    if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
        return False
    kind = type(part)
    if isinstance(part, FeedForward) and not part.emits():
        return False
    return kind in PARTS or (issubclass(kind, Block | Mixer | FeedForward) and "emit" in vars(kind))


def _readable(tensor: Tensor) -> bool:
    """Whether a program reads it right: whole rows, of a kind that it knows."""
    kinds = (torch.float32, torch.bfloat16, torch.int8, torch.uint8)
    return tensor.device.type == "cpu" and tensor.dtype in kinds and tensor.is_contiguous()


class ProgramRunner(Runner):
    """A step is a program: of a model that `suits`, going on from its own `state`.

    It is for the weights that the model has when it is made.
    """

    @torch.inference_mode()
    def __init__(self, model: LanguageModel, state: ModelState):
        self.model, self.state = model, state
        self._layouts = LayoutsAhead(model, AHEAD)
        self._program = StepProgram(model, state)
        self._logits = self._program.head()

    def _step(self, tokens: Tensor) -> Tensor:
        layout = self._layouts.next(self.state.positions)
        self._program.run_on(self.model.embed(tokens), layout.by_rotation)
        self.state.positions.add_(1)
        return self._logits.values.clone()  # the next step writes over it


def reads(model: LanguageModel, rows: Sequence[list[int]]) -> bool:
    """Whether `read` takes these tokens: a few, as many in each row."""
    lengths, quantization = {len(tokens) for tokens in rows}, model.config.quantization
    few = FEW[32 if quantization is None else quantization.bits]
    return len(lengths) == 1 and len(rows) * max(lengths) <= few and suits(model)


@torch.inference_mode()
def read(model: LanguageModel, rows: Sequence[list[int]], state: ModelState) -> ModelState:
    """The state after the tokens of each row, by the recurrent form; `state` stays as it is.

    For a few tokens what costs is to read the weights, and this reads them once.
    """
    tokens = torch.tensor(rows, dtype=torch.int64, device=model.device)  # [B,T]
    after, count = state.clone(), tokens.shape[1]
    program = StepProgram(model, after, count)
    steps = torch.arange(count, dtype=torch.int64, device=model.device)
    angles = model.angles(state.positions[:, None] + steps)
    program.run_on(model.embed(tokens).flatten(0, 1), angles)
    after.positions.add_(count)
    return after


class StepProgram(Program):
    """The program of T tokens of each sequence; M = B·T rows, a sequence's one after the other."""

    def __init__(self, model: LanguageModel, state: ModelState, tokens: int = 1):
        """Updates `state`, where it lies, whenever it is run."""
        model.check_state(state)
        if any(
            x.dtype != torch.float32 for layer in state.layers for x in layer.tensors().values()
        ):
            raise InputError("the state is of a model in another dtype; give one of this model")
        super().__init__(state.batch_size * tokens)
        self._model, self.tokens = model, tokens
        self._angles: dict[Hashable, Angles] = {}  # of each row, filled for every run
        x = self._x = self.new(model.config.hidden_size)
        for block, layer in zip(model.blocks, state.layers, strict=True):
            x = block.emit(self, x, layer)
        self._hidden = x

    def angles(self, rotation: Rotation, heads: int) -> Angles:
        """Tables `[M,H,K]` of the angles of the rows' positions in a run."""
        if rotation.key not in self._angles:
            size = (4, self.rows, heads, 2 * rotation.frequencies.value.shape[-1])
            tables = torch.empty(size, dtype=torch.float32, device="cpu")
            self._angles[rotation.key] = Angles(*tables.unbind())
        return self._angles[rotation.key]

    def head(self) -> Rows:
        """The logits are wanted, too."""
        model, x = self._model, self._hidden
        head = model.embed_tokens if model.lm_head is None else model.lm_head
        if isinstance(head, QuantizedEmbedding):
            head = head.table
        return self.product(self.norm(x, model.norm, x.size), head)

    def run_on(self, x: Tensor, by_rotation: AnglesByKey) -> None:
        """Embeddings `[M,D]`, angles `[B,T,1|H,K]` of their positions."""
        self._x.values.copy_(x)
        for key, tables in self._angles.items():
            for table, angles in zip(tables, by_rotation[key], strict=True):
                table.copy_(angles.flatten(0, 1))
        self.run()
