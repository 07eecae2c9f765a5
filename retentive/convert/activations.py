"""Names of activations in the code that checkpoints come from, and of the same functions here."""

from collections.abc import Mapping

from retentive.errors import InputError

TORCHSCALE_NAMES = {"gelu": "gelu", "relu": "relu", "swish": "swish"}
"""Also of the code derived from torchscale's, and of yet-another-retnet."""

XATL_NAMES = {**TORCHSCALE_NAMES, "gelu_new": "gelu_tanh"}

TRANSFORMERS_NAMES = {
    "gelu": "gelu",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python": "gelu",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "swish",
    "swish": "swish",
}
"""Of transformers' ACT2FN; its others, such as mish, are not known here."""


def activation(field: str, name: str, known: Mapping[str, str]) -> str:
    """The name here of the activation that `field` of a config names."""
    if name not in known:
        *names, last = known
        raise InputError(f"{field} is {name!r}; known here are {', '.join(names)} and {last}")
    return known[name]
