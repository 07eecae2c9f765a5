"""Checkpoints by their name on the Hugging Face Hub."""

import re
from pathlib import Path

from retentive.errors import InputError

# Never code: what is fetched are weights, JSON and tokenizers.
SMALL = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
SAFE = ["*.safetensors"]
PICKLED = ["*.bin", "*.pt", "*.pth"]


def is_name(given: str) -> bool:
    """Is it like "fla-hub/retnet-1.3B-100B"?"""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", given) is not None


def fetch(name: str) -> Path:
    """The folder with a repository's config, tokenizer and weights: safetensors, if it has them.

    From the Hub's cache where the network is off. InputError where it cannot be had.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(
            f"there is no file or folder {name}; to fetch it from the Hub:"
            ' pip install "retentive[hf]"'
        ) from None
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=SMALL + SAFE))
        if not any(folder.glob("*.safetensors")):
            huggingface_hub.snapshot_download(name, allow_patterns=SMALL + PICKLED)
        return folder
    except Exception as error:  # of requests, httpx, the file system and the Hub's own
        raise InputError(
            f"there is no file or folder {name}, and the Hub does not give it: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """Of the refusals that a user can do something about, what to do; of others the first line."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return "it is gated; ask for access on its page, then `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "it has no repository of that name, or a private one, which takes `hf auth login`"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
