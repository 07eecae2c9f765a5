"""What a model is, as plain frozen data: the fields of `config.json` and of a run's `[model]`.

In Python and TOML the fields are nested, in `config.json` they are flat (`retentive.models.flat`);
`from_dict` reads both. Sizes left out are filled in when a config is made, so that what is saved
holds numbers. Every mistake is an InputError of one line.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from retentive.errors import InputError, nearest
from retentive.fields import check_positive, check_types
from retentive.layers.feed_forward import FeedForwardConfig
from retentive.layers.parts import Norm
from retentive.layers.quantized import Quantization
from retentive.mixers import dataclass_of, mixer_config
from retentive.mixers.attention import AttentionConfig
from retentive.mixers.base import MixerConfig
from retentive.mixers.retention import RetentionConfig
from retentive.models import flat

ResidualKind = Literal["pre-norm", "post-norm", "output-norm", "parallel", "mixer-only"]
Initialization = Literal["paper", "official"]

# Hugging Face writes these beside a model's own fields; they do not touch the mathematics.
BOOKKEEPING = frozenset(
    "architectures attn_implementation auto_map bos_token_id chunk_size_feed_forward dtype "
    "eos_token_id experts_implementation id2label is_decoder is_encoder_decoder label2id "
    "model_type name_or_path num_labels output_attentions output_hidden_states pad_token_id "
    "problem_type return_dict torch_dtype transformers_version use_cache".split()
)

MOST_LAYERS = 10_000  # a number beyond is a broken file, and would fill memory with modules

# The end of `model_type` where weights are quantised: other loaders refuse what they cannot read.
QUANTIZED = "-quantized"


@dataclass(frozen=True)
class ModelConfig:
    """A language model: embedding, blocks of a mixer and an FFN, norm, head.

    mixer            of every layer, a `MixerConfig` or its fields with their `kind`
    ffn              of every layer, a `FeedForwardConfig` or its fields
    other_layers     the layers (from 0) whose mixer is `other_mixer` instead: a hybrid
    norm, norm_eps   of the width; norms have weights, "layernorm" biases, too
    block            the residual wiring of a block's sublayers f, first the mixer, then the FFN:
                     "pre-norm", a X + f(Norm(X)); "post-norm", Norm(a X + f(X)); "output-norm",
                     a X + Norm(f(X)); "parallel", a X + mixer(Norm₁(X)) + FFN(Norm₂(X));
                     "mixer-only", pre-norm without an FFN
    residual_scale   a; DeepNet's is (2L)^¼
    final_norm       a norm before the head (`norm`)
    embed_scale      a factor of the embeddings
    embed_norm       a norm of the scaled embeddings (`embed_norm`)
    head_bias        of `lm_head`, which then cannot be tied
    initialization   "paper", DeepNet's; "official", that of the authors' code

    Parameters: `embed_tokens.weight`, `embed_norm.*`, `norm.*`, `lm_head.*`; in `layers.N.`
    `MIXER_norm.*`, `MIXER.*` with the name of the mixer, `ffn_norm.*` and
    `ffn.{gate,up,down}_proj.*` (act(gate) ⊙ up; without a gate act(up)), `ffn.subln.*`.
    """

    model_type: ClassVar[str] = "retentive"
    mixer_kind: ClassVar[str | None] = None
    """The kind where the mixer's fields do not say."""
    flat_fields: ClassVar[flat.Table] = flat.ANY

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    mixer: MixerConfig
    ffn: FeedForwardConfig = field(default_factory=FeedForwardConfig)
    norm: Norm = "layernorm"
    norm_eps: float = 1e-6
    dropout: float = 0.0
    tie_word_embeddings: bool = False
    initialization: Initialization = "paper"
    quantization: Quantization | None = None
    block: ResidualKind = "pre-norm"
    residual_scale: float = 1.0
    final_norm: bool = True
    embed_scale: float = 1.0
    embed_norm: bool = False
    head_bias: bool = False
    other_layers: tuple[int, ...] = ()
    other_mixer: MixerConfig | None = None

    def __post_init__(self) -> None:
        # Nested fields may come as JSON or TOML have them
        self._read_mixer("mixer", self.mixer_kind)
        self._read_mixer("other_mixer", "attention")
        for name, cls in (("ffn", FeedForwardConfig), ("quantization", Quantization)):
            if isinstance(given := getattr(self, name), Mapping):
                self._resolve(name, dataclass_of(cls, given, name))
        if isinstance(self.other_layers, list):
            self._resolve("other_layers", tuple(self.other_layers))

        check_types(self)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "norm_eps"):
            check_positive(name, getattr(self, name))
        for name in ("residual_scale", "embed_scale"):
            check_positive(name, getattr(self, name))
        if self.num_hidden_layers > MOST_LAYERS:
            raise InputError(
                f"num_hidden_layers is {self.num_hidden_layers}; give at most {MOST_LAYERS}"
            )
        if self.head_bias and self.tie_word_embeddings:
            raise InputError("a tied head has no bias; leave head_bias or tie_word_embeddings out")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}; give a probability in [0, 1)")
        self._check_other_layers()

        # Sizes that follow from the width
        self._resolve("mixer", self.mixer.for_width(self.hidden_size))
        self._resolve("ffn", self.ffn.for_width(self.hidden_size, self.mixer.ffn_ratio))
        if self.other_mixer is not None:
            self._resolve("other_mixer", self.other_mixer.for_width(self.hidden_size))

    def _read_mixer(self, name: str, kind: str | None) -> None:
        given = getattr(self, name)
        if isinstance(given, Mapping):
            fields = given if kind is None else {"kind": kind, **given}
            self._resolve(name, mixer_config(fields, name))

    def _check_other_layers(self) -> None:
        layers, depth = self.other_layers, self.num_hidden_layers
        if (self.other_mixer is None) != (not layers):
            raise InputError(
                "other_mixer and other_layers (attention and attention_layers of a RetNet) go"
                " together; give both or neither"
            )
        if list(layers) != sorted(set(layers) & set(range(depth))):
            raise InputError(
                f"other_layers (attention_layers) is {list(layers)};"
                f" give layers from 0 to {depth - 1}, rising"
            )

    def _resolve(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def mixers(self) -> list[MixerConfig]:
        """The mixer of each layer."""
        return [
            self.other_mixer if index in self.other_layers and self.other_mixer else self.mixer
            for index in range(self.num_hidden_layers)
        ]

    @property
    def ffn_dim(self) -> int:
        """The width of the FFN, known to be a number."""
        assert self.ffn.intermediate_size is not None
        return self.ffn.intermediate_size

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields, with `model_type`: another one where weights are quantised."""
        quantized = "" if self.quantization is None else QUANTIZED
        return {"model_type": self.model_type + quantized, **flat.written(self)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; fields may be flat or nested.

        Passes Hugging Face's bookkeeping over, refuses other keys.
        """
        known = [one.name for one in dataclasses.fields(cls) if one.init]
        given: dict[str, Any] = {}
        for key, value in fields.items():
            if key in cls.flat_fields or key in known:
                flat.put(given, cls.flat_fields.get(key, key), value)
            elif key not in BOOKKEEPING and not key.startswith("_"):
                close = nearest(key, [*cls.flat_fields, *known])
                raise InputError(
                    f"unknown model config key {key!r}{close};"
                    f" known are {', '.join(dict.fromkeys([*cls.flat_fields, *known]))}"
                )
        return dataclass_of(cls, given, "model config")


@dataclass(frozen=True)
class RetNetConfig(ModelConfig):
    """A RetNet, with layers of attention if it is a hybrid. The defaults are the paper's layer."""

    mixer_kind: ClassVar[str | None] = "retention"
    flat_fields: ClassVar[flat.Table] = flat.RETNET

    mixer: RetentionConfig
    other_mixer: AttentionConfig | None = None

    @classmethod
    def named(cls, size: str, **overrides: Any) -> Self:
        """A size of the paper (200m, 1.3b, 2.7b, 6.7b, 13b) or "demo", but for `overrides`.

        Overrides are fields as `from_dict` takes them.
        """
        return cls.from_dict({**named_size(size), **overrides})


@dataclass(frozen=True)
class TransformerConfig(ModelConfig):
    """The baseline: a Transformer with rotary positions (MHA, or GQA with num_kv_heads)."""

    model_type: ClassVar[str] = "retentive-transformer"
    mixer_kind: ClassVar[str | None] = "attention"
    flat_fields: ClassVar[flat.Table] = flat.TRANSFORMER

    mixer: AttentionConfig
    other_layers: tuple[int, ...] = field(default=(), init=False)
    other_mixer: None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        mixer = dataclasses.replace(self.mixer, num_kv_heads=self.mixer.kv_heads)
        self._resolve("mixer", mixer)


def config_class(mixer: str, other: str | None = None) -> type[ModelConfig]:
    """The class of a model whose layers have mixers of these kinds."""
    if mixer == "retention" and other in (None, "attention"):
        return RetNetConfig
    return TransformerConfig if (mixer, other) == ("attention", None) else ModelConfig


def config_from_dict(fields: Mapping[str, Any]) -> ModelConfig:
    """The config that `fields["model_type"]` names, and the kinds of its mixers."""
    model_type = fields.get("model_type")
    if fields.get("quantization") is not None and isinstance(model_type, str):
        model_type = model_type.removesuffix(QUANTIZED)
    if model_type == TransformerConfig.model_type:
        return TransformerConfig.from_dict(fields)
    if model_type != ModelConfig.model_type:
        raise InputError(
            f"model_type is {model_type!r}; this package opens {ModelConfig.model_type},"
            f" {TransformerConfig.model_type} (`retentive convert` makes a folder of other"
            " checkpoints)"
        )
    kinds = [_kind_in(fields, "mixer", "retention"), _kind_in(fields, "other_mixer", None)]
    return config_class(*kinds).from_dict(fields)


def _kind_in(fields: Mapping[str, Any], name: str, default: Any) -> Any:
    given = fields.get(name)
    return given.get("kind", default) if isinstance(given, Mapping) else default


def _paper_size(hidden_size: int, num_hidden_layers: int) -> dict[str, int]:
    """K is 256 and V 512 in every size; the vocabulary is GPT-2's, rounded up for the hardware."""
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_heads": hidden_size // 256,
        "vocab_size": 50304,
    }


SIZES: dict[str, dict[str, Any]] = {  # flat
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


def named_size(size: str) -> dict[str, Any]:
    """The flat fields of a size by name. InputError for an unknown one."""
    if size not in SIZES:
        raise InputError(
            f"unknown model size {size!r}{nearest(size, SIZES)}; choose one of {', '.join(SIZES)}"
        )
    return SIZES[size]
