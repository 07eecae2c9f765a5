"""The model that an adapter was trained on, and no other."""

from pathlib import Path

from retentive.errors import InputError


def check_base(adapter: Path, trained_on: str, given: str) -> None:
    """InputError unless the fingerprints are of the same weights; their dtypes may differ."""
    if trained_on.partition(":")[2] != given.partition(":")[2]:
        raise InputError(
            f"the adapter in {adapter} was trained on another model, or on other weights of this "
            "one; give the model folder that it was trained on"
        )
