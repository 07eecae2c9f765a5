"""The configs that transformers sees: our fields beside its own."""

import dataclasses
from os import PathLike
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from retentive.errors import InputError
from retentive.models import flat
from retentive.models.config import (
    BOOKKEEPING,
    QUANTIZED,
    ModelConfig,
    TransformerConfig,
    config_from_dict,
)


class RetentiveConfig(PreTrainedConfig):
    """The fields of a model's `config.json`, checked and filled in as in `ModelConfig`.

    Raises InputError for an unknown field, a missing one, and a value that does not fit.
    """

    model_type = ModelConfig.model_type
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"num_attention_heads": "num_heads"}
    has_no_defaults_at_init: ClassVar[bool] = True

    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **fields: Any):
        theirs = {key: fields.pop(key) for key in list(fields) if _is_theirs(key)}
        ours = self._checked(fields)
        super().__post_init__(**theirs)
        written = flat.written(ours, sparse=False)
        self._ours = tuple(written)
        for name, value in written.items():
            setattr(self, name, value)

    def as_native(self) -> ModelConfig:
        """Our config, of the fields as they are now."""
        return self._checked({name: getattr(self, name) for name in self._ours})

    def _checked(self, fields: dict[str, Any]) -> ModelConfig:
        quantized = fields.get("quantization") is not None
        kind = self.model_type.removesuffix(QUANTIZED) + (QUANTIZED if quantized else "")
        return config_from_dict({**fields, "model_type": kind})

    def to_dict(self) -> dict[str, Any]:
        """Their keys, and ours as `config.json` has them."""
        return self._with_ours(super().to_dict())

    def to_diff_dict(self) -> dict[str, Any]:
        """As `to_dict`, without those of their keys that have their defaults."""
        output = super().to_diff_dict()
        for field in dataclasses.fields(self):
            if field.name in output and output[field.name] == field.default:
                del output[field.name]
        return self._with_ours(output)

    def to_json_file(self, json_file_path: str | PathLike[str], use_diff: bool = True) -> None:
        """Raises InputError, and writes nothing, where the file would open nowhere again."""
        ours = self._ours
        strange = [key for key in self.to_dict() if key not in ours and not _is_theirs(key)]
        if strange:
            raise InputError(
                f"config.{strange[0]} is no field of a model; keep it in a file of its own and"
                f" del config.{strange[0]} before you save"
            )
        super().to_json_file(json_file_path, use_diff)

    def _with_ours(self, output: dict[str, Any]) -> dict[str, Any]:
        names = self._ours
        theirs = {key: value for key, value in output.items() if key not in names}
        return theirs | self.as_native().to_dict() | {"model_type": self.model_type}


class RetentiveTransformerConfig(RetentiveConfig):
    """The fields of `TransformerConfig`, the baseline's."""

    model_type = TransformerConfig.model_type


class RetentiveQuantizedConfig(RetentiveConfig):
    """A folder of `retentive quantize`: its tokenizer opens, its model is refused."""

    model_type = ModelConfig.model_type + QUANTIZED


def _is_theirs(key: str) -> bool:
    return key in BOOKKEEPING or key.startswith("_")
