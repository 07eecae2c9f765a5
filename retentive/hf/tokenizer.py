"""A model folder's tokenizer.json as transformers' own tokenizer."""

from typing import Any

from transformers import PreTrainedTokenizerFast
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
        end = opened.convert_ids_to_tokens(found)
        tokens: dict[str, Any] = {"eos_token": end, "pad_token": opened.pad_token or end}
        if end == END:
            tokens |= {"bos_token": end, "add_bos_token": True}
        return PreTrainedTokenizerFast(
            tokenizer_object=opened.backend_tokenizer,
            name_or_path=str(name),
            padding_side=kwargs.get("padding_side", "left"),
            **tokens,
        )


def end_of_text(name: Any, kwargs: dict[str, Any]) -> int | None:
    """The id of the token that ends a text, by the tokenizer.json of a folder or Hub repository.

    `kwargs` may say where, as for `from_pretrained`. None without a tokenizer or such a token.
    """
    where = {key: kwargs[key] for key in _WHERE if key in kwargs}
    file = cached_file(
        name,
        FILE,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **where,
    )
    if file is None:
        return None
    try:
        return end_id(load_tokenizer(file))
    except InputError:
        return None
