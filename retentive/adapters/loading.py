"""A model folder with an adapter, opened as one model."""

from pathlib import Path

from retentive.adapters import initial_state, lora
from retentive.adapters.base import check_base
from retentive.convert.loading import load, load_config
from retentive.devices import resolve_device, resolve_dtype
from retentive.errors import InputError
from retentive.models import checkpoint
from retentive.models.fingerprint import fingerprint
from retentive.models.language_model import LanguageModel


def load_adapted(
    folder: str | Path, adapter: str | Path, *, device: str = "cpu", dtype: str = "float32"
) -> LanguageModel:
    """The model of `folder`, in eval mode, with LoRA merged into its weights, or a tuned state.

    It is adapted in the dtype it was trained in, then brought to `dtype`. InputError where a file
    is missing or broken, for another model's adapter, and for a quantised model.
    """
    where, kind, adapter = resolve_device(device), resolve_dtype(dtype), Path(adapter)
    is_lora = holds_lora(adapter)
    values, base = lora.read(adapter) if is_lora else initial_state.read(adapter)
    refuse_adapter(Path(folder))
    refuse_quantised(folder)
    exact = "float32" if base is None else base.partition(":")[0]
    model = load(folder, device=str(where), dtype=exact)
    if base is not None:
        check_base(adapter, base, fingerprint(model))
    if isinstance(values, dict):
        return lora.merge(model, adapter, values).to(kind).eval()
    initial_state.begin_with(model.to(kind), values)
    return model.eval()


def holds_lora(adapter: Path) -> bool:
    """Or a tuned state. InputError for a folder that holds neither, or both."""
    if not adapter.is_dir():
        raise InputError(f"there is no adapter folder {adapter}; give one that training wrote")
    kinds = [(adapter / name).is_file() for name in (lora.CONFIG, initial_state.FILE)]
    if all(kinds):
        raise InputError(
            f"{adapter} holds {lora.CONFIG} and {initial_state.FILE}; keep one adapter in a folder"
        )
    if not any(kinds) and (adapter / checkpoint.CONFIG).is_file():
        raise InputError(f"{adapter} is a model, no adapter; give it in the place of the model")
    if not any(kinds):
        raise InputError(
            f"{adapter} holds neither {lora.CONFIG} (of LoRA) nor {initial_state.FILE} (of state "
            "tuning); give an adapter's folder"
        )
    return kinds[0]


def refuse_adapter(folder: Path) -> None:
    """InputError where an adapter stands in the place of its model."""
    found = [name for name in (lora.CONFIG, initial_state.FILE) if (folder / name).is_file()]
    if found and not (folder / checkpoint.CONFIG).is_file():
        raise InputError(
            f"{folder} is an adapter; give the model it was trained on, and --adapter {folder}"
        )


def refuse_quantised(folder: str | Path) -> None:
    if load_config(folder).quantization is not None:
        raise InputError(
            f"the weights of {folder} are quantised; give the model it was made from (and quantise "
            "after retentive merge)"
        )
