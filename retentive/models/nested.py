"""Configs within a model's config: how its weights are quantised, what its attention layers are."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from retentive.errors import InputError, nearest
from retentive.fields import check_divisible, check_even, check_positive, check_types


@dataclass(frozen=True)
class Quantization:
    """How the weights of linear layers are stored (`retentive.layers.quantized`).

    bits         16 (bfloat16), 8, a scale a row, or 4, a scale and an offset for `group_size`
                 columns of a row; of embedding and head never fewer than 8
    source       the fingerprint of the model that was quantised
    """

    bits: int
    source: str
    group_size: int = 32

    def __post_init__(self) -> None:
        check_types(self)
        if self.bits not in (16, 8, 4):
            raise InputError(f"quantization bits are {self.bits}; this package knows 16, 8 and 4")
        if self.group_size not in (32, 64, 128):
            raise InputError(f"quantization group_size is {self.group_size}; it is 32, 64 or 128")


@dataclass(frozen=True)
class AttentionConfig:
    """The attention layers of a hybrid: rotary positions, softmax, heads of hidden_size/num_heads.

    num_kv_heads   fewer than num_heads: groups of consecutive heads share keys and values
    qkv_bias       of q, k and v; o has none
    window         how many tokens a token sees, itself among them; None for all before it
    rope_theta     the base of the rotation's frequencies
    """

    num_heads: int
    num_kv_heads: int | None = None
    qkv_bias: bool = False
    window: int | None = None
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        check_types(self)
        for name, value in (
            ("num_heads", self.num_heads),
            ("num_kv_heads", self.kv_heads),
            ("window", 1 if self.window is None else self.window),
            ("rope_theta", self.rope_theta),
        ):
            check_positive(f"attention {name}", value)
        check_divisible(
            "attention num_heads", self.num_heads, self.kv_heads, "attention num_kv_heads"
        )

    @property
    def kv_heads(self) -> int:
        """`num_kv_heads`, by default `num_heads`."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def check_width(self, hidden_size: int) -> None:
        """InputError where the heads do not divide the model's width into even dims."""
        check_divisible("hidden_size", hidden_size, self.num_heads, "attention num_heads")
        check_even("hidden_size", hidden_size, self.num_heads)


NESTED: dict[str, Any] = {"quantization": Quantization, "attention": AttentionConfig}


def from_fields(name: str, given: dict[str, Any]) -> Any:
    """What the field `name` holds, of its fields as JSON has them."""
    kind = NESTED[name]
    known = [one.name for one in dataclasses.fields(kind)]
    for key in given.keys() - set(known):
        raise InputError(
            f"unknown {name} key {key!r}{nearest(key, known)}; known are {', '.join(known)}"
        )
    required = {one.name for one in dataclasses.fields(kind) if one.default is dataclasses.MISSING}
    if missing := required - given.keys():
        raise InputError(f"{name} lacks {min(missing)!r}; give it a value")
    return kind(**given)
