"""`retentive.load`: a model from our own folder or from anybody's checkpoint."""

import json
from pathlib import Path

from retentive.convert.plan import OURS, plan
from retentive.convert.source import CONFIG, open_source
from retentive.devices import resolve_device, resolve_dtype
from retentive.models import checkpoint
from retentive.models.build import empty_model
from retentive.models.language_model import LanguageModel


def load(source: str | Path, *, device: str = "cpu", dtype: str = "float32") -> LanguageModel:
    """The model of `source`, in eval mode: a folder of ours, or any that `retentive convert` reads.

    That is: a local folder or file of a known dialect, or a name on the Hub. Beyond the model
    a tensor or two are in memory, of torch's own files one file. InputError where it does not
    open, with the reason.
    """
    folder = Path(source).expanduser()
    if _is_plainly_ours(folder):
        return checkpoint.load(folder, device=device, dtype=dtype)
    where, kind = resolve_device(device), resolve_dtype(dtype)
    made = plan(open_source(source))
    model = empty_model(made.config)
    as_stored = {name for name, _ in model.named_buffers()}  # quantised
    tensors = {}
    for name, tensor in made.stream():
        # A copy: what is mapped from a file is not aligned, see `models.files.read_tensors`.
        tensors[name] = tensor.to(where, tensor.dtype if name in as_stored else kind, copy=True)
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(made.config.quantization is None).to(where).eval()


def _is_plainly_ours(folder: Path) -> bool:
    """Has it our config and one file of weights? Then `models.checkpoint` has the better words."""
    try:
        fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    ours = isinstance(fields, dict) and fields.get("model_type") in OURS
    return ours and (folder / checkpoint.WEIGHTS).is_file()
