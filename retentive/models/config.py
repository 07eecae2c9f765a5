"""What a model is, as plain frozen data: the fields of `config.json`.

Sizes left out are resolved when the config is made, so that what is saved holds numbers. Every mistake is an
InputError of one line.
"""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from retentive.errors import InputError, nearest
from retentive.ops.decay import log_decay

# Hugging Face writes these beside a model's own fields; they say nothing about the mathematics.
BOOKKEEPING = frozenset(
    "architectures auto_map bos_token_id dtype eos_token_id is_decoder model_type name_or_path output_attentions "
    "output_hidden_states pad_token_id return_dict torch_dtype transformers_version use_cache".split()
)


@dataclass(frozen=True)
class ModelConfig:
    """The fields that RetNet and the Transformer baseline share."""

    model_type: ClassVar[str]

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_heads: int
    intermediate_size: int | None = None
    hidden_act: Literal["gelu", "swish"] = "gelu"
    gated_ffn: bool = False
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-6
    dropout: float = 0.0
    tie_word_embeddings: bool = False
    initialization: Literal["paper", "official"] = "paper"

    def __post_init__(self) -> None:
        _check_types(self)
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
        """Plain JSON-able fields, with `model_type`."""
        return {"model_type": self.model_type, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The inverse of `to_dict`. Hugging Face's bookkeeping keys are passed over, others that we do not know refused."""
        known = [field.name for field in dataclasses.fields(cls)]
        given = {key: _as_tuple(value) for key, value in fields.items() if key in known}
        for key in fields.keys() - given.keys():
            if key not in BOOKKEEPING and not key.startswith("_"):
                raise InputError(
                    f"unknown model config key {key!r}{nearest(key, known)}; known are {', '.join(known)}"
                )
        for field in dataclasses.fields(cls):
            if field.name not in given and field.default is dataclasses.MISSING:
                raise InputError(f"the model config lacks {field.name!r}; give it a value")
        return cls(**given)


@dataclass(frozen=True)
class RetNetConfig(ModelConfig):
    """A RetNet. The defaults are the paper's layer.

    qk_dim, value_dim        total over heads; hidden_size and 2 · hidden_size unless given
    intermediate_size        2 · hidden_size; gated FFNs get the width that keeps the parameter count
    head_norm                over the V values of each head, no affine weights; "layernorm" is GroupNorm with a group a head
    decay                    "power" (γ = 1 - 2^(-5-h)), "linspace" (paper §3.1), or log γ of each head
    rotation                 "official": θ_p = base^(-p/(K/2-1)); "rope": θ_p = base^(-2p/K)
    row_scale                multiply row n by 1/√Σ_{i≤n} γ^i (paper §2.1), as the official code does
    initialization           "paper": DeepNet's gains; "official": those of the authors' code

    Dims are rotated in the pairs (p, p + K/2). A checkpoint that pairs (2p, 2p+1) is the same model with the rows of W_Q
    and W_K permuted within each head: evens first, then odds; exactly.
    """

    model_type: ClassVar[str] = "retentive"

    qk_dim: int | None = None
    value_dim: int | None = None
    head_norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    head_norm_eps: float = 1e-6
    decay: Literal["power", "linspace"] | tuple[float, ...] = "power"
    rotation: Literal["official", "rope"] = "official"
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
        if self.qk_head_dim % 2:
            raise InputError(
                f"qk_dim {self.qk_dim} over {self.num_heads} heads gives the odd head dim {self.qk_head_dim};"
                " rotation pairs dims, so choose an even one"
            )
        log_decay(self.num_heads, self.decay)  # refuses a bad list

    def _default_intermediate_size(self) -> int:
        return _round_to(16, 4 * self.hidden_size / 3) if self.gated_ffn else 2 * self.hidden_size

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

    @classmethod
    def named(cls, size: str, **overrides: Any) -> Self:
        """A size of the paper (200m, 1.3b, 2.7b, 6.7b, 13b), or "demo", with single fields replaced by `overrides`."""
        sizes = {
            "demo": {
                "hidden_size": 256,
                "num_hidden_layers": 4,
                "num_heads": 4,
                "vocab_size": 8192,
            },
            "200m": _paper_size(1024, 16),
            "1.3b": _paper_size(2048, 24),
            "2.7b": _paper_size(2560, 32),
            "6.7b": _paper_size(4096, 32),
            "13b": _paper_size(5120, 40),
        }
        if size not in sizes:
            raise InputError(
                f"unknown model size {size!r}{nearest(size, sizes)}; choose one of {', '.join(sizes)}"
            )
        return cls.from_dict({**sizes[size], **overrides})


@dataclass(frozen=True)
class TransformerConfig(ModelConfig):
    """The baseline: a pre-norm Transformer with rotary positions; `num_kv_heads` below `num_heads` is grouped-query attention."""

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
        if self.head_dim % 2:
            raise InputError(
                f"hidden_size {self.hidden_size} over {self.num_heads} heads gives the odd head dim {self.head_dim};"
                " rotation pairs dims, so choose an even one"
            )

    def _default_intermediate_size(self) -> int:
        return _round_to(16, 8 * self.hidden_size / 3) if self.gated_ffn else 4 * self.hidden_size

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
        """The baseline of `retnet`: its width, depth, vocabulary, norm and kind of FFN, and its number of parameters.

        The FFN takes up what attention has less than retention. Head dims are 64 to 128 where the width allows it.
        """
        width = retnet.hidden_size
        num_heads = next(
            (width // dim for dim in (64, 128, *range(66, 128, 2)) if width % dim == 0),
            retnet.num_heads,
        )
        if width >= 2048 and width % 128 == 0:
            num_heads = width // 128
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_positive("num_kv_heads", kv_heads)
        _check_divisible("num_heads", num_heads, kv_heads, "num_kv_heads")
        assert retnet.qk_dim is not None and retnet.value_dim is not None
        matrices = 3 if retnet.gated_ffn else 2
        layer = width * (2 * retnet.qk_dim + 3 * retnet.value_dim + matrices * retnet.ffn_dim)
        attention = width * (2 * width + 2 * width * kv_heads // num_heads)
        shared = {
            field.name: getattr(retnet, field.name) for field in dataclasses.fields(ModelConfig)
        }
        return cls(
            **{
                **shared,
                "num_heads": num_heads,
                "num_kv_heads": kv_heads,
                "intermediate_size": _round_to(8, (layer - attention) / (matrices * width)),
            }
        )


def config_from_dict(fields: dict[str, Any]) -> RetNetConfig | TransformerConfig:
    """The config that `fields["model_type"]` names."""
    kinds = {kind.model_type: kind for kind in (RetNetConfig, TransformerConfig)}
    model_type = fields.get("model_type")
    if model_type not in kinds:
        raise InputError(f"model_type is {model_type!r}; this package opens {', '.join(kinds)}")
    return kinds[model_type].from_dict(fields)


def _paper_size(width: int, depth: int) -> dict[str, int]:
    """K = 256 and V = 512 in every size; a vocabulary of GPT-2's size, padded to a multiple of 64."""
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_heads": width // 256,
        "vocab_size": 50304,
    }


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


def _check_types(config: ModelConfig) -> None:
    for name, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is ClassVar:
            continue
        value = getattr(config, name)
        if not _fits(value, hint):
            words = [word for word in _words(hint) if isinstance(value, str)]
            raise InputError(
                f"{name} is {value!r}{nearest(str(value), words)}; give {_describe(hint)}"
            )


def _fits(value: Any, hint: Any) -> bool:
    match typing.get_origin(hint):
        case typing.Literal:
            return isinstance(value, str) and value in typing.get_args(hint)
        case types.UnionType | typing.Union:
            return any(_fits(value, option) for option in typing.get_args(hint))
        case builtin if builtin is tuple:
            return isinstance(value, tuple) and all(_fits(item, float) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _words(hint: Any) -> list[str]:
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    return [word for option in typing.get_args(hint) for word in _words(option)]


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", type(None): "nothing"}
    match typing.get_origin(hint):
        case typing.Literal:
            return " or ".join(typing.get_args(hint))
        case types.UnionType | typing.Union:
            return " or ".join(_describe(option) for option in typing.get_args(hint))
        case builtin if builtin is tuple:
            return "a list of numbers"
    return names[hint]
