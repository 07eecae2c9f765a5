"""Retentive Networks (arXiv 2307.08621): the op, the model and the tools around it.

Names load when they are first used; importing the package needs torch and nothing else.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retentive.convert.loading import load, load_tokenizer
    from retentive.inference.generate import generate
    from retentive.mixers.retention import MultiScaleRetention
    from retentive.models.config import RetNetConfig, TransformerConfig
    from retentive.models.retnet import RetNet
    from retentive.models.state import RetNetState
    from retentive.models.transformer import Transformer
    from retentive.ops import retention, retention_step

__version__ = "0.1.0"

_HOME = {
    "retention": "retentive.ops",
    "retention_step": "retentive.ops",
    "RetNetConfig": "retentive.models.config",
    "TransformerConfig": "retentive.models.config",
    "MultiScaleRetention": "retentive.mixers.retention",
    "RetNet": "retentive.models.retnet",
    "Transformer": "retentive.models.transformer",
    "RetNetState": "retentive.models.state",
    "load": "retentive.convert.loading",
    "load_tokenizer": "retentive.convert.loading",
    "generate": "retentive.inference.generate",
}

__all__ = [  # noqa: RUF022 - in the order of a reader's path
    "retention",
    "retention_step",
    "RetNetConfig",
    "TransformerConfig",
    "MultiScaleRetention",
    "RetNet",
    "Transformer",
    "RetNetState",
    "load",
    "load_tokenizer",
    "generate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'retentive' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
