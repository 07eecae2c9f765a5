"""What a model is, as plain frozen data: the fields of `config.json`.

Sizes left out are filled in when a config is made, so that what is saved holds numbers. Every
mistake is an InputError of one line.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from retentive.errors import InputError, nearest
from retentive.fields import check_divisible, check_even, check_positive, check_types
from retentive.models.nested import NESTED, AttentionConfig, Quantization, from_fields
from retentive.ops.decay import log_decay

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "swish"]
Norm = Literal["layernorm", "rmsnorm"]
OptionalNorm = Literal["layernorm", "rmsnorm", "none"]
BlockKind = Literal["pre-norm", "post-norm", "output-norm", "parallel"]
Decay = Literal["power", "linspace"] | tuple[float, ...]
RotationRule = Literal["official", "rope", "rope-across-heads"]
Initialization = Literal["paper", "official"]

# Hugging Face writes these beside a model's own fields; they do not touch the mathematics.
BOOKKEEPING = frozenset(
    "architectures attn_implementation auto_map bos_token_id chunk_size_feed_forward dtype "
    "eos_token_id experts_implementation id2label is_decoder is_encoder_decoder label2id "
    "model_type name_or_path num_labels output_attentions output_hidden_states pad_token_id "
    "problem_type return_dict torch_dtype transformers_version use_cache".split()
)


# The end of `model_type` where weights are quantised: other loaders refuse what they cannot read.
QUANTIZED = "-quantized"


# Written to config.json only where they have another value than their default: a plain RetNet's
# stays short.
SPARSE = frozenset(
    "quantization block residual_scale final_norm embed_scale embed_norm ffn_bias ffn_subln "
    "head_bias gate_act head_norm_affine rotary_dim xpos_base num_kv_heads qkv_bias gate_bias "
    "out_bias attention_layers attention".split()
)


@dataclass(frozen=True)
class ModelConfig:
    """The fields that RetNet and the Transformer baseline share.

    hidden_act       of the FFN: "gelu" and what approximates it, "gelu_tanh" and "quick_gelu",
                     x σ(1.702 x); "relu" and its square "relu2"; "swish", also known as SiLU
    block            how a block joins its parts f, first the mixer of tokens, then the FFN, to X:
                     "pre-norm", a X + f(Norm(X)); "post-norm", Norm(a X + f(X)); "output-norm",
                     a X + Norm(f(X)); "parallel", a X + mixer(Norm₁(X)) + FFN(Norm₂(X))
    residual_scale   a; DeepNet's is (2L)^¼
    final_norm       a norm before the head (`norm`)
    embed_scale      what embeddings are multiplied by
    embed_norm       a norm of the scaled embeddings (`embed_norm`)
    ffn_bias         of the FFN's projections
    ffn_subln        a norm within the FFN, before its last projection (`layers.N.ffn.subln`)
    head_bias        of `lm_head`, which then cannot be tied

    Norms of the width and of the FFN have weights, "layernorm" biases, too; all have `norm_eps`.
    """

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
    block: BlockKind = "pre-norm"
    residual_scale: float = 1.0
    final_norm: bool = True
    embed_scale: float = 1.0
    embed_norm: bool = False
    ffn_bias: bool = False
    ffn_subln: OptionalNorm = "none"
    head_bias: bool = False

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            self._resolve(one.name, _as_tuple(getattr(self, one.name)))
        for name in NESTED:
            if isinstance(fields := getattr(self, name, None), dict):
                self._resolve(name, from_fields(name, fields))
        check_types(self)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads"):
            check_positive(name, getattr(self, name))
        if self.intermediate_size is None:
            self._resolve("intermediate_size", self._default_intermediate_size())
        check_positive("intermediate_size", self.ffn_dim)
        for name in ("norm_eps", "residual_scale", "embed_scale"):
            check_positive(name, getattr(self, name))
        if self.head_bias and self.tie_word_embeddings:
            raise InputError("a tied head has no bias; leave head_bias or tie_word_embeddings out")
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
        for one in dataclasses.fields(self):
            if one.name in SPARSE and fields[one.name] == one.default:
                del fields[one.name]
        quantized = "" if self.quantization is None else QUANTIZED
        return {"model_type": self.model_type + quantized, **fields}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The inverse of `to_dict`. Passes Hugging Face's bookkeeping over, refuses other keys."""
        known = [one.name for one in dataclasses.fields(cls)]
        given = {key: value for key, value in fields.items() if key in known}
        for key in fields.keys() - given.keys():
            if key not in BOOKKEEPING and not key.startswith("_"):
                raise InputError(
                    f"unknown model config key {key!r}{nearest(key, known)};"
                    f" known are {', '.join(known)}"
                )
        for one in dataclasses.fields(cls):
            if one.name not in given and one.default is dataclasses.MISSING:
                raise InputError(f"the model config lacks {one.name!r}; give it a value")
        return cls(**given)


@dataclass(frozen=True)
class RetNetConfig(ModelConfig):
    """A RetNet. The defaults are the paper's layer.

    qk_dim, value_dim   of all heads together; hidden_size and 2 · hidden_size unless given
    intermediate_size   2 · hidden_size; for a gated FFN what gives it as many parameters
    gate                MSR(X) = (swish(X W_G) ⊙ Y) W_O; False leaves Y W_O (an ablation)
    gate_act            what is in the place of swish
    head_norm           over the V values of a head, without weights; "layernorm" is what the paper
                        calls GroupNorm, with a group for each head; "none" is an ablation
    head_norm_affine    it has weights [V] that all heads of a layer share (`retention.head_norm`)
    decay               "power", γ = 1 - 2^(-5-h); "linspace", of paper §3.1; or each head's log γ
    rotation            "official", θ_p = base^(-p/(K/2-1)); "rope", θ_p = base^(-2p/K);
                        "rope-across-heads", θ_hp = base^(-2(h K/2 + p)/(H K))
    rotary_dim          how many of the K dims turn: the pairs p < rotary_dim/2, whose θ_p are those
                        of a head of rotary_dim dims; all unless given
    xpos_base           q is scaled by ζ_p^(n/base), k by ζ_p^(-n/base), ζ = (e + 0.4) / 1.4 where
                        θ = rotation_base^(-e) (xPos, arXiv 2212.10554)
    row_scale           row n times 1/√Σ_{i≤n} γ^i (paper §2.1), as the authors' code has it
    num_kv_heads        fewer than num_heads: groups of consecutive heads share keys and values
    qkv_bias, gate_bias, out_bias    of the projections q, k and v; of g; of o
    attention_layers    the layers (from 0) that have attention instead: a hybrid
    attention           what these layers are (`AttentionConfig`, or its fields)
    initialization      "paper", DeepNet's; "official", that of the authors' code

    The dims p and p + K/2 of a head turn together. A checkpoint that pairs 2p and 2p + 1 is exactly
    the same model with the rows of W_Q and W_K in another order within each head: evens, then odds.
    So is one whose first rotary_dim dims turn: the first half of these goes to 0 and on, the second
    to K/2 and on.

    Parameters: `embed_tokens.weight`, `embed_norm.*`, `norm.*`, `lm_head.*`; in `layers.N.`
    `retention_norm.*`, `retention.{q,k,v,g,o}_proj.*`, `retention.head_norm.*`, `ffn_norm.*`,
    `ffn.{gate,up,down}_proj.*` (act(gate) ⊙ up; without a gate act(up)), `ffn.subln.*`; an
    attention layer has `attention_norm.*` and `attention.{q,k,v,o}_proj.*` for the first three.
    """

    model_type: ClassVar[str] = "retentive"

    qk_dim: int | None = None
    value_dim: int | None = None
    gate: bool = True
    head_norm: OptionalNorm = "layernorm"
    head_norm_eps: float = 1e-6
    decay: Decay = "power"
    rotation: RotationRule = "official"
    rotation_base: float = 10000.0
    row_scale: bool = False
    gate_act: Activation = "swish"
    head_norm_affine: bool = False
    rotary_dim: int | None = None
    xpos_base: float | None = None
    num_kv_heads: int | None = None
    qkv_bias: bool = False
    gate_bias: bool = False
    out_bias: bool = False
    attention_layers: tuple[int, ...] = ()
    attention: AttentionConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.qk_dim is None:
            self._resolve("qk_dim", self.hidden_size)
        if self.value_dim is None:
            self._resolve("value_dim", 2 * self.hidden_size)
        for name in ("qk_dim", "value_dim", "head_norm_eps", "rotation_base"):
            check_positive(name, getattr(self, name))
        check_positive("num_kv_heads", self.kv_heads)
        for name in ("qk_dim", "value_dim"):
            check_divisible(name, getattr(self, name), self.num_heads)
        check_even("qk_dim", self.qk_dim, self.num_heads)
        check_divisible("num_heads", self.num_heads, self.kv_heads, "num_kv_heads")
        log_decay(self.num_heads, self.decay)  # refuses a bad list
        self._check_rotation()
        self._check_attention()
        if self.gate_bias and not self.gate:
            raise InputError("gate_bias is true without a gate; leave it out")
        if self.head_norm_affine and self.head_norm == "none":
            raise InputError("head_norm_affine is true, but head_norm is none; leave it out")

    def _check_rotation(self) -> None:
        if self.xpos_base is not None:
            check_positive("xpos_base", self.xpos_base)
        R, K = self.rotary_dim, self.qk_head_dim
        if R is not None and (R % 2 or not 0 < R <= K):
            raise InputError(f"rotary_dim is {R}; give an even number from 2 to the head dim {K}")
        grouped = self.kv_heads != self.num_heads
        if self.rotation == "rope-across-heads" and (grouped or R is not None):
            raise InputError(
                "rotation is rope-across-heads, which turns all dims of as many key heads as heads;"
                " leave rotary_dim and num_kv_heads out"
            )

    def _check_attention(self) -> None:
        layers, depth = self.attention_layers, self.num_hidden_layers
        if (self.attention is None) != (not layers):
            raise InputError("attention and attention_layers go together; give both or neither")
        if self.attention is not None:
            self.attention.check_width(self.hidden_size)
        if list(layers) != sorted(set(layers) & set(range(depth))):
            raise InputError(
                f"attention_layers is {list(layers)}; give layers from 0 to {depth - 1}, rising"
            )

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
    def kv_heads(self) -> int:
        """`num_kv_heads`, by default `num_heads`."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def projected_dims(self) -> int:
        """Of q, k, v, g and o together; times hidden_size it is the weights of such a layer."""
        K, V = self.qk_head_dim, self.value_head_dim
        return self.num_heads * (K + (2 if self.gate else 1) * V) + self.kv_heads * (K + V)

    @property
    def mixer_dims(self) -> float:
        """As `projected_dims`, in the mean of all layers: a hybrid's attention layers, too."""
        if self.attention is None:
            return self.projected_dims
        attention = 2 * self.hidden_size * (1 + self.attention.kv_heads / self.attention.num_heads)
        share = len(self.attention_layers) / self.num_hidden_layers
        return share * attention + (1 - share) * self.projected_dims

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
            check_positive(name, getattr(self, name))
        check_divisible("hidden_size", self.hidden_size, self.num_heads)
        check_divisible("num_heads", self.num_heads, self.kv_heads, "num_kv_heads")
        check_even("hidden_size", self.hidden_size, self.num_heads)

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
        shared = {one.name: getattr(retnet, one.name) for one in dataclasses.fields(ModelConfig)}
        shared |= {"num_heads": num_heads, "num_kv_heads": kv_heads, "quantization": None}
        cls(**shared)  # checks that the heads divide before they are divided
        matrices = 3 if retnet.gated_ffn else 2
        layer = retnet.mixer_dims + matrices * retnet.ffn_dim
        attention = 2 * width + 2 * width * kv_heads // num_heads
        return cls(**{**shared, "intermediate_size": _round_to(8, (layer - attention) / matrices)})


def config_from_dict(fields: dict[str, Any]) -> RetNetConfig | TransformerConfig:
    """The config that `fields["model_type"]` names."""
    kinds = {kind.model_type: kind for kind in (RetNetConfig, TransformerConfig)}
    model_type = fields.get("model_type")
    if fields.get("quantization") is not None and isinstance(model_type, str):
        model_type = model_type.removesuffix(QUANTIZED)
    if model_type not in kinds:
        raise InputError(
            f"model_type is {model_type!r}; this package opens {', '.join(kinds)}"
            " (`retentive convert` makes a folder of other checkpoints)"
        )
    return kinds[model_type].from_dict(fields)


def _head_dim(width: int) -> int:
    """128 from a width of 2048 on, else 64; failing these what divides the width, at worst all."""
    preferred = (128, 64) if width >= 2048 else (64, 128)
    return next(dim for dim in (*preferred, *range(66, 128, 2), width) if width % dim == 0)


def _round_to(multiple: int, value: float) -> int:
    return multiple * max(1, round(value / multiple))


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
