"""What a model is, as plain frozen data: the fields of `config.json`.

Sizes left out are filled in when a config is made, so that what is saved holds numbers. Every
mistake is an InputError of one line.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from retentive.errors import InputError, nearest
from retentive.models.fields import check_types
from retentive.ops.decay import log_decay

Activation = Literal["gelu", "swish"]
Norm = Literal["layernorm", "rmsnorm"]
HeadNorm = Literal["layernorm", "rmsnorm", "none"]
Decay = Literal["power", "linspace"] | tuple[float, ...]
RotationRule = Literal["official", "rope"]
Initialization = Literal["paper", "official"]

# Hugging Face writes these beside a model's own fields; they do not touch the mathematics.
BOOKKEEPING = frozenset(
    "architectures auto_map bos_token_id dtype eos_token_id is_decoder model_type name_or_path "
    "output_attentions output_hidden_states pad_token_id return_dict torch_dtype "
    "transformers_version use_cache".split()
)


# The end of `model_type` where weights are quantised: other loaders refuse what they cannot read.
QUANTIZED = "-quantized"


@dataclass(frozen=True)
class Quantization:
    """How the weights of linear layers are stored (`retentive.models.quantized`).

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
class ModelConfig:
    """The fields that RetNet and the Transformer baseline share."""

    model_type: ClassVar[str]

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_heads: int
    intermediate_size: int | None = None
    hidden_act: Activation = "gelu"
    gated_ffn: bool = False
    norm: Norm = "layernorm"
    norm_eps: float = 1e-6
    dropout: float = 0.0
    tie_word_embeddings: bool = False
    initialization: Initialization = "paper"
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads"):
            _check_positive(name, getattr(self, name))
        if self.intermediate_size is None:
            self._resolve("intermediate_size", self._default_intermediate_size())
        _check_positive("intermediate_size", self.ffn_dim)
        _check_positive("norm_eps", self.norm_eps)
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}; give a probability in [0, 1)")

    def _default_intermediate_size(self) -> int:
        raise NotImplementedError

    def _resolve(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def ffn_dim(self) -> int:
        """`intermediate_size`, known to be a number."""
        assert self.intermediate_size is not None
        return self.intermediate_size

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields, with `model_type`: another one where weights are quantised."""
        fields = dataclasses.asdict(self)
        if self.quantization is None:
            del fields["quantization"]
            return {"model_type": self.model_type, **fields}
        return {"model_type": self.model_type + QUANTIZED, **fields}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The inverse of `to_dict`. Passes Hugging Face's bookkeeping over, refuses other keys."""
        known = [field.name for field in dataclasses.fields(cls)]
        given = {key: _as_tuple(value) for key, value in fields.items() if key in known}
        for key in fields.keys() - given.keys():
            if key not in BOOKKEEPING and not key.startswith("_"):
                raise InputError(
                    f"unknown model config key {key!r}{nearest(key, known)};"
                    f" known are {', '.join(known)}"
                )
        for field in dataclasses.fields(cls):
            if field.name not in given and field.default is dataclasses.MISSING:
                raise InputError(f"the model config lacks {field.name!r}; give it a value")
        if isinstance(scheme := given.get("quantization"), dict):
            given["quantization"] = _quantization(scheme)
        return cls(**given)


@dataclass(frozen=True)
class RetNetConfig(ModelConfig):
    """A RetNet. The defaults are the paper's layer.

    qk_dim, value_dim   of all heads together; hidden_size and 2 · hidden_size unless given
    intermediate_size   2 · hidden_size; for a gated FFN what gives it as many parameters
    gate                MSR(X) = (swish(X W_G) ⊙ Y) W_O; False leaves Y W_O (an ablation)
    head_norm           over the V values of a head, without weights; "layernorm" is what the paper
                        calls GroupNorm, with a group for each head; "none" is an ablation
    decay               "power", γ = 1 - 2^(-5-h); "linspace", of paper §3.1; or each head's log γ
    rotation            "official", θ_p = base^(-p/(K/2-1)); "rope", θ_p = base^(-2p/K)
    row_scale           row n times 1/√Σ_{i≤n} γ^i (paper §2.1), as the authors' code has it
    initialization      "paper", DeepNet's; "official", that of the authors' code

    The dims p and p + K/2 of a head turn together. A checkpoint that pairs 2p and 2p + 1 is exactly
    the same model with the rows of W_Q and W_K in another order within each head: evens, then odds.
    """

    model_type: ClassVar[str] = "retentive"

    qk_dim: int | None = None
    value_dim: int | None = None
    gate: bool = True
    head_norm: HeadNorm = "layernorm"
    head_norm_eps: float = 1e-6
    decay: Decay = "power"
    rotation: RotationRule = "official"
    rotation_base: float = 10000.0
    row_scale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.qk_dim is None:
            self._resolve("qk_dim", self.hidden_size)
        if self.value_dim is None:
            self._resolve("value_dim", 2 * self.hidden_size)
        for name in ("qk_dim", "value_dim", "head_norm_eps", "rotation_base"):
            _check_positive(name, getattr(self, name))
        for name in ("qk_dim", "value_dim"):
            _check_divisible(name, getattr(self, name), self.num_heads)
        _check_even("qk_dim", self.qk_dim, self.num_heads)
        log_decay(self.num_heads, self.decay)  # refuses a bad list

    def _default_intermediate_size(self) -> int:
        return _round_to(8, 4 * self.hidden_size / 3) if self.gated_ffn else 2 * self.hidden_size

    @property
    def qk_head_dim(self) -> int:
        """K."""
        assert self.qk_dim is not None
        return self.qk_dim // self.num_heads

    @property
    def value_head_dim(self) -> int:
        """V."""
        assert self.value_dim is not None
        return self.value_dim // self.num_heads

    @property
    def projected_dims(self) -> int:
        """Of q, k, v, g and o together; times hidden_size it is the weights of a layer's mixer."""
        K, V = self.qk_head_dim, self.value_head_dim
        return self.num_heads * (2 * K + (3 if self.gate else 2) * V)

    @classmethod
    def named(cls, size: str, **overrides: Any) -> Self:
        """A size of the paper (200m, 1.3b, 2.7b, 6.7b, 13b) or "demo", but for `overrides`."""
        if size not in SIZES:
            raise InputError(
                f"unknown model size {size!r}{nearest(size, SIZES)};"
                f" choose one of {', '.join(SIZES)}"
            )
        return cls.from_dict({**SIZES[size], **overrides})


def _paper_size(hidden_size: int, num_hidden_layers: int) -> dict[str, int]:
    """K is 256 and V 512 in every size; the vocabulary is GPT-2's, rounded up for the hardware."""
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_heads": hidden_size // 256,
        "vocab_size": 50304,
    }


SIZES: dict[str, dict[str, Any]] = {
    "demo": {
        "hidden_size": 192,
        "num_hidden_layers": 3,
        "num_heads": 4,
        "vocab_size": 4096,
        "tie_word_embeddings": True,
    },
    "200m": _paper_size(1024, 16),
    "1.3b": _paper_size(2048, 24),
    "2.7b": _paper_size(2560, 32),
    "6.7b": _paper_size(4096, 32),
    "13b": _paper_size(5120, 40),
}


@dataclass(frozen=True)
class TransformerConfig(ModelConfig):
    """The baseline: a pre-norm Transformer with rotary positions.

    With `num_kv_heads` below `num_heads` groups of heads share keys and values (GQA).
    """

    model_type: ClassVar[str] = "retentive-transformer"

    num_kv_heads: int | None = None
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_kv_heads is None:
            self._resolve("num_kv_heads", self.num_heads)
        for name in ("num_kv_heads", "rope_theta"):
            _check_positive(name, getattr(self, name))
        _check_divisible("hidden_size", self.hidden_size, self.num_heads)
        _check_divisible("num_heads", self.num_heads, self.kv_heads, "num_kv_heads")
        _check_even("hidden_size", self.hidden_size, self.num_heads)

    def _default_intermediate_size(self) -> int:
        return _round_to(8, 8 * self.hidden_size / 3) if self.gated_ffn else 4 * self.hidden_size

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """`num_kv_heads`, known to be a number."""
        assert self.num_kv_heads is not None
        return self.num_kv_heads

    @classmethod
    def matching(cls, retnet: RetNetConfig, num_kv_heads: int | None = None) -> Self:
        """The baseline of `retnet`: all that they share, and as many parameters.

        The FFN takes what attention needs less than retention. A head has 64 to 128 dims where the
        width allows it.
        """
        width = retnet.hidden_size
        num_heads = width // _head_dim(width) if width >= 64 else retnet.num_heads
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        shared = {
            field.name: getattr(retnet, field.name) for field in dataclasses.fields(ModelConfig)
        }
        shared |= {"num_heads": num_heads, "num_kv_heads": kv_heads, "quantization": None}
        cls(**shared)  # checks that the heads divide before they are divided
        matrices = 3 if retnet.gated_ffn else 2
        layer = retnet.projected_dims + matrices * retnet.ffn_dim
        attention = 2 * width + 2 * width * kv_heads // num_heads
        return cls(**{**shared, "intermediate_size": _round_to(8, (layer - attention) / matrices)})


def config_from_dict(fields: dict[str, Any]) -> RetNetConfig | TransformerConfig:
    """The config that `fields["model_type"]` names."""
    kinds = {kind.model_type: kind for kind in (RetNetConfig, TransformerConfig)}
    model_type = fields.get("model_type")
    if fields.get("quantization") is not None and isinstance(model_type, str):
        model_type = model_type.removesuffix(QUANTIZED)
    if model_type not in kinds:
        raise InputError(f"model_type is {model_type!r}; this package opens {', '.join(kinds)}")
    return kinds[model_type].from_dict(fields)


def _quantization(fields: dict[str, Any]) -> Quantization:
    known = [field.name for field in dataclasses.fields(Quantization)]
    for key in fields.keys() - set(known):
        raise InputError(f"unknown quantization key {key!r}; known are {', '.join(known)}")
    if missing := {"bits", "source"} - fields.keys():
        raise InputError(f"quantization lacks {min(missing)!r}; quantise the model again")
    return Quantization(**fields)


def _head_dim(width: int) -> int:
    """128 from a width of 2048 on, else 64; failing these what divides the width, at worst all."""
    preferred = (128, 64) if width >= 2048 else (64, 128)
    return next(dim for dim in (*preferred, *range(66, 128, 2), width) if width % dim == 0)


def _round_to(multiple: int, value: float) -> int:
    return multiple * max(1, round(value / multiple))


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"{name} is {value}; give a number above 0")


def _check_divisible(name: str, value: int, by: int, by_name: str = "num_heads") -> None:
    if value % by:
        raise InputError(
            f"{name} {value} is not divisible by {by_name} {by}; choose a multiple of it"
        )


def _check_even(name: str, value: int | None, heads: int) -> None:
    assert value is not None
    if (value // heads) % 2:
        raise InputError(
            f"{name} {value} over {heads} heads gives the odd head dim {value // heads};"
            " rotation pairs dims, so choose an even one"
        )
