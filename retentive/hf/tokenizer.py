"""A model folder's tokenizer.json as transformers' own tokenizer."""

from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.hub import cached_file

from retentive.data.tokenizer import END, FILE, end_id, load_tokenizer
from retentive.errors import InputError

_WHERE = ("cache_dir", "local_files_only", "revision", "subfolder", "token")


class RetentiveTokenizer(PreTrainedTokenizerFast):
    """Opens folders that say no more of their tokenizer than tokenizer.json does.

    What comes up is a plain PreTrainedTokenizerFast, which every transformers can save and load.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *inputs: Any, **kwargs: Any):
        """With the end of a text as eos and pad; if it is ours also as bos, before every text.

        So models were trained, and so `retentive.generate` begins. Pads are on the left, as for
        generation. What tokenizer_config.json or `kwargs` say is kept.
        """
        name = pretrained_model_name_or_path
        opened = PreTrainedTokenizerFast.from_pretrained(name, *inputs, **kwargs)
        found = None if opened.eos_token else end_of_text(name, kwargs)
        if found is None:
            return opened
        said = get_tokenizer_config(name, **_where(kwargs)) | kwargs
        end = opened.convert_ids_to_tokens(found)
        options: dict[str, Any] = {"padding_side": said.get("padding_side", "left")}
        names = ["eos_token", "pad_token"]
        if end == END:
            names.append("bos_token")
            # transformers passes over what a tokenizer_config.json says of this one
            options["add_bos_token"] = said.get("add_bos_token", True)
        options |= {name: end for name in names if getattr(opened, name) is None}
        return PreTrainedTokenizerFast.from_pretrained(name, *inputs, **kwargs | options)


def end_of_text(name: Any, kwargs: dict[str, Any]) -> int | None:
    """The id of the token that ends a text, by the tokenizer.json of a folder or Hub repository.

    `kwargs` may say where, as for `from_pretrained`. None without a tokenizer or such a token.
    """
    file = cached_file(
        name,
        FILE,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **_where(kwargs),
    )
    if file is None:
        return None
    try:
        return end_id(load_tokenizer(file))
    except InputError:
        return None


def _where(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: kwargs[key] for key in _WHERE if key in kwargs}
