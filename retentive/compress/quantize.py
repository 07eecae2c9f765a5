"""A model's weights in 16, 8 or 4 bits: how the numbers that are stored are found.

Every weight is rounded for itself; no text is needed. Shapes: W `[N out, K in]`, G columns a group.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from retentive.errors import InputError, nearest
from retentive.layers.quantized import QuantizedLinear, pack_nibbles
from retentive.models.checkpoint import empty_model
from retentive.models.config import ModelConfig, Quantization
from retentive.models.fingerprint import fingerprint
from retentive.models.language_model import LanguageModel

SCHEMES = {"bf16": 16, "int8": 8, "int4": 4}

_AT_ONCE = 2**22  # weights whose 4-bit numbers are sought at once: some twenty times these bytes


def scheme_bits(name: str) -> int:
    """Of "bf16", "int8", "int4"; InputError for another name."""
    if name not in SCHEMES:
        near = nearest(name, SCHEMES)
        raise InputError(f"unknown format {name!r}{near}; choose {', '.join(SCHEMES)}")
    return SCHEMES[name]


def check_source(config: ModelConfig) -> None:
    """InputError for what is quantised already: its lost digits cannot be had back."""
    if (scheme := config.quantization) is not None:
        raise InputError(
            f"the model's weights have {scheme.bits} bits already;"
            " quantise the model that it was made from"
        )


@torch.no_grad()
def quantize(model: LanguageModel, bits: int, group_size: int = 32) -> LanguageModel:
    """A copy of `model` whose linear layers, embedding and head have 16, 8 or 4 bits a weight.

    With 4 bits embedding and head have 8. Raises InputError for a model that is quantised already.
    """
    model.check_storable()
    check_source(model.config)
    scheme = Quantization(bits, source=fingerprint(model), group_size=group_size)
    made = empty_model(replace(model.config, quantization=scheme))
    given = dict(model.named_parameters())
    tensors = {}
    for name, layer in made.named_modules():
        if isinstance(layer, QuantizedLinear):
            weight = given.pop(f"{name.removesuffix('.table')}.weight")
            for part, tensor in quantize_weight(weight.float(), layer.quantization).items():
                tensors[f"{name}.{part}"] = tensor
    tensors |= {name: norm.detach().clone() for name, norm in given.items()}
    made.load_state_dict(tensors, assign=True)
    return made.to(model.device).requires_grad_(False).eval()


def quantize_weight(weight: Tensor, scheme: Quantization) -> dict[str, Tensor]:
    """What `QuantizedLinear` stores of W, float32 `[N,K]`."""
    if scheme.bits == 16:
        return {"qweight": weight.bfloat16()}
    if scheme.bits == 8:
        return _eight_bits(weight)
    rows = max(1, _AT_ONCE // weight.shape[1])
    parts = [_four_bits(part, scheme.group_size) for part in weight.split(rows)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _eight_bits(weight: Tensor) -> dict[str, Tensor]:
    """A scale a row, such that its largest weight is at most 127.

    The scale is rounded to bfloat16 first and the codes are found for what it then is, so that this
    rounding costs nothing; 1 + 2^-8 makes up for rounding down.
    """
    largest = weight.abs().amax(1).clamp_min(torch.finfo(torch.bfloat16).tiny * 127)
    scales = (largest / 127 * (1 + 2**-8)).bfloat16()
    return {"qweight": (weight / scales.float()[:, None]).round().to(torch.int8), "scales": scales}


def _four_bits(weight: Tensor, group_size: int) -> dict[str, Tensor]:
    """Scale and offset of each group with the least squared error of those tried.

    A start is the range of a group, or a part of it about the middle: to cut off the extremes makes
    all steps finer. From there codes and their best line through the weights (linear regression)
    are found in turns.
    """
    groups = F.pad(weight, (0, -weight.shape[1] % group_size)).unflatten(1, (-1, group_size))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    best: list[Tensor] = []
    for part in (1.0, 0.9, 0.8, 0.7):
        scales = (high - low) * (part / 15)
        zeros = (high + low + scales) / 2  # codes - 8 run from -8 to 7: their middle is -1/2
        for _ in range(3):
            scales, zeros = _line(groups, _codes(groups, scales, zeros))
        scales, zeros = scales.bfloat16().float(), zeros.bfloat16().float()
        codes = _codes(groups, scales, zeros)
        error = (codes * scales + zeros - groups).square().sum(-1, keepdim=True)
        found = [error, codes, scales, zeros]
        if best:
            pairs = zip(found, best, strict=True)
            found = [torch.where(error < best[0], new, old) for new, old in pairs]
        best = found
    _, codes, scales, zeros = best
    return {
        "qweight": pack_nibbles((codes + 8).to(torch.uint8).flatten(1)),
        "scales": scales.squeeze(-1).bfloat16(),
        "zeros": zeros.squeeze(-1).bfloat16(),
    }


def _codes(groups: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The whole numbers from -8 to 7 whose values are nearest to the weights."""
    return ((groups - zeros) / scales.clamp_min(_TINY)).round_().clamp_(-8, 7)


def _line(groups: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset of the least squared error for given codes, `[N,K/G,1]`."""
    middle, mean = codes.mean(-1, keepdim=True), groups.mean(-1, keepdim=True)
    apart = codes - middle
    spread = apart.square().sum(-1, keepdim=True).clamp_min(_TINY)  # 0 where all codes are one
    scales = (apart * groups).sum(-1, keepdim=True) / spread
    return scales, mean - scales * middle


_TINY = torch.finfo(torch.bfloat16).tiny
