"""What ties a saved state to the weights of its model."""

import hashlib
import json

import torch

from retentive.models.language_model import LanguageModel


def fingerprint(model: LanguageModel, samples: int = 64) -> str:
    """The weights' dtype and a hash of the config and of evenly spaced samples of every weight.

    As "float32:...". Quick for a model of any size; every step of training changes it.
    """
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().flatten()
        step = max(1, flat.numel() // samples)
        values = flat[::step][:samples].to("cpu", torch.float64)
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return f"{str(model.dtype).removeprefix('torch.')}:{digest.hexdigest()}"
