"""The configs that transformers sees: our fields beside its own."""

import dataclasses
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from retentive.models.config import (
    BOOKKEEPING,
    QUANTIZED,
    ModelConfig,
    RetNetConfig,
    TransformerConfig,
)

# What PreTrainedConfig takes beside BOOKKEEPING; any other key is a field of ours, or a mistake.
_THEIRS = BOOKKEEPING | {field.name for field in dataclasses.fields(PreTrainedConfig)}
_THEIRS |= {"attn_implementation", "experts_implementation", "num_labels"}


class RetentiveConfig(PreTrainedConfig):
    """The fields of `RetNetConfig`. They are checked, and those left out filled in, as there.

    Raises InputError for an unknown field, a missing one, and a value that does not fit.
    """

    model_type = RetNetConfig.model_type
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"num_attention_heads": "num_heads"}
    native: ClassVar[type[ModelConfig]] = RetNetConfig
    has_no_defaults_at_init: ClassVar[bool] = True

    def __post_init__(self, **fields: Any):
        theirs = {key: fields.pop(key) for key in list(fields) if _is_theirs(key)}
        ours = self.native.from_dict(fields)
        super().__post_init__(**theirs)
        for name, value in dataclasses.asdict(ours).items():
            setattr(self, name, value)

    def as_native(self) -> ModelConfig:
        """Our config, of the fields as they are now."""
        names = (field.name for field in dataclasses.fields(self.native))
        return self.native.from_dict({name: getattr(self, name) for name in names})

    def to_dict(self) -> dict[str, Any]:
        """Their keys, and ours as `config.json` has them."""
        return self._with_ours(super().to_dict())

    def to_diff_dict(self) -> dict[str, Any]:
        """As `to_dict`, without those of their keys that have their defaults."""
        return self._with_ours(super().to_diff_dict())

    def _with_ours(self, output: dict[str, Any]) -> dict[str, Any]:
        names = {field.name for field in dataclasses.fields(self.native)}
        theirs = {key: value for key, value in output.items() if key not in names}
        return theirs | self.as_native().to_dict() | {"model_type": self.model_type}


class RetentiveTransformerConfig(RetentiveConfig):
    """The fields of `TransformerConfig`, the baseline's."""

    model_type = TransformerConfig.model_type
    native = TransformerConfig


class RetentiveQuantizedConfig(RetentiveConfig):
    """A folder of `retentive quantize`: its tokenizer opens, its model is refused."""

    model_type = RetNetConfig.model_type + QUANTIZED


def _is_theirs(key: str) -> bool:
    return key in _THEIRS or key.startswith("_")
