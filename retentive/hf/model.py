"""Our models behind transformers' interface.

Shapes: B rows, T tokens (columns, pads among them), D width; tokens `[B,T]`, logits `[B,T,vocab]`.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.initialization import guard_torch_init_functions
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from retentive.errors import InputError
from retentive.hf.cache import CACHE, RetentiveCache, checked, take_cache
from retentive.hf.card import write_card
from retentive.hf.config import (
    RetentiveConfig,
    RetentiveQuantizedConfig,
    RetentiveTransformerConfig,
)
from retentive.hf.tokenizer import end_of_text
from retentive.layers.layout import Layout
from retentive.layers.loss import IGNORED
from retentive.layers.rotation import Constant
from retentive.models.build import build_model
from retentive.models.language_model import LanguageModel
from retentive.models.state import ModelState

_PROMPTS = ("inputs", "input_ids", "inputs_embeds")
_ASSISTED = GenerationMode.ASSISTED_GENERATION


class RetentiveForCausalLM(PreTrainedModel, GenerationMixin):
    """A model of ours for transformers.

    `retentive` is the model as this package has it (`LanguageModel`). It and this object have the
    same layers: what one trains, replaces or moves, the other has. So weights have the same names
    in both, and the folders that both write are the same.
    """

    config_class: type[RetentiveConfig] = RetentiveConfig
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # num_items_in_batch
    retentive: LanguageModel

    def __init__(self, config: RetentiveConfig):
        super().__init__(config)
        model = build_model(config.as_native())
        self.__dict__["retentive"] = model  # as a submodule it would prefix the names
        self._modules = model._modules
        self._no_split_modules = {type(block).__name__ for block in model.layers}  # FSDP asks
        if model.device.type != "meta":
            self._mark_initialized()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: RetentiveCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        past_key_values: RetentiveCache | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits `[B,T,vocab]`, loss, and the cache after these tokens.

        attention_mask: `[B, past + T]`, 0 at pads, wherever they are; a row's results are those of
            the row alone without them, and zero at pads. What the cache has read as real stays so.
        labels: `[B,T]`, the tokens themselves, -100 for none; each is predicted by the real token
            before it. The loss never forms all logits, and in training no logits are returned
            beside it unless `logits_to_keep` asks: the last n, 0 for all, or indices of columns.
        num_items_in_batch: what the sum of the losses is divided by; left out, their number.
        use_cache: that of the config, True unless said, but False in training.
        output_hidden_states: that of the config unless given.
        position_ids: refused, since attention_mask says where rows begin.
        token_type_ids: of tokenizers that make them; as in other causal models without a meaning.
        past_key_values: the cache, as transformers before 5.24 spells it.
        """
        given = take_cache({"cache": cache, "past_key_values": past_key_values})
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise InputError("retention forms no attention weights; leave output_attentions out")
        if position_ids is not None:
            raise InputError(
                "position_ids are not read: documents packed by them would be one text; give each a"
                " row of its own, and an attention_mask where rows are padded"
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        tokens = _one_of(input_ids, inputs_embeds)
        cache = RetentiveCache() if given is None else checked(given)
        real = cache.real(attention_mask, tokens)
        if cache.records:
            tokens, real = self._read_ahead(cache, tokens, real, logits_to_keep)
        if given is not None and labels is None and _only_pads(real):
            cache.add(tokens, real, cache.state)
            return self._of_pads(tokens, cache, logits_to_keep, output_hidden_states)

        layout = self.retentive.layout(tokens, cache.state, real)
        if given is None and not use_cache:
            layout = dataclasses.replace(layout, keeps_state=False)
        with _inputs(self.retentive.layers if output_hidden_states else ()) as hidden_states:
            h, after = self.retentive.hidden(layout.unpad(tokens), cache.state, layout=layout)
        if after is not None:
            cache.add(tokens, real, after)

        loss = logits = None
        if labels is not None:
            targets = _targets(labels, tokens, layout)
            if num_items_in_batch is None:
                loss = self.retentive.loss(h, targets)
            else:
                loss = self.retentive.loss(h, targets, reduction="sum") / num_items_in_batch
        if loss is None or logits_to_keep is not None or not self.training:
            logits = self.retentive.head(layout.pad(h)[:, _columns(logits_to_keep)])
        return CausalLMOutputWithPast(
            loss=loss,  # pyright: ignore[reportArgumentType]
            logits=logits,  # pyright: ignore[reportArgumentType]
            **_held(None if after is None else cache),
            hidden_states=tuple(map(layout.pad, [*hidden_states, h])) if hidden_states else None,  # pyright: ignore
        )

    def _of_pads(
        self,
        tokens: Tensor,
        cache: RetentiveCache,
        logits_to_keep: int | Tensor | None,
        output_hidden_states: bool | None,
    ) -> CausalLMOutputWithPast:
        """Zeros: `generate` reads a prompt in chunks, and in the first no row may have begun."""
        config, shape = self.config, tokens.shape[:2]
        zeros = torch.zeros(*shape, config.vocab_size, dtype=self.dtype, device=tokens.device)
        states = (zeros.new_zeros(*shape, config.hidden_size),) * (config.num_hidden_layers + 1)
        return CausalLMOutputWithPast(
            logits=zeros[:, _columns(logits_to_keep)],  # pyright: ignore[reportArgumentType]
            **_held(cache),
            hidden_states=states if output_hidden_states else None,  # pyright: ignore
        )

    def _read_ahead(
        self,
        cache: RetentiveCache,
        tokens: Tensor,
        real: Tensor | None,
        logits_to_keep: int | Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Leaves the tokens whose logits are wanted: only such are ever taken back."""
        if (unread := cache.unread) is not None:
            unread_real = None if cache.mask is None else cache.mask[:, -unread.shape[1] :]
            cache.read_again(self._read(unread, unread_real, cache.state))
        if not isinstance(logits_to_keep, int) or not 0 < logits_to_keep < tokens.shape[1]:
            return tokens, real
        first, rest = tokens[:, :-logits_to_keep], tokens[:, -logits_to_keep:]
        first_real, rest_real = None, None
        if real is not None:
            first_real, rest_real = real[:, :-logits_to_keep], real[:, -logits_to_keep:]
        cache.add(first, first_real, self._read(first, first_real, cache.state))
        cache.mark()
        return rest, rest_real

    def _read(
        self, tokens: Tensor, real: Tensor | None, state: ModelState | None
    ) -> ModelState | None:
        if _only_pads(real):
            return state
        layout = self.retentive.layout(tokens, state, real)
        _, after = self.retentive.hidden(layout.unpad(tokens), state, layout=layout)
        return after

    # Folders

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any):
        """As transformers has it. Where nothing else is said, `generate` ends at the tokenizer's
        end of a text, and pads with it. Raises InputError for weights on several devices.
        """
        asked = dict(kwargs)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        places = set(getattr(model, "hf_device_map", {}).values())
        if len(places) > 1 or "disk" in places:
            raise InputError(
                "device_map spreads the model over several devices or to disk; it runs whole on"
                ' one: give device_map="cpu" or "cuda"'
            )
        for module in model.modules():
            if isinstance(module, Constant):
                module.to(model.device)
        said = model.generation_config
        unsaid = [name for name in ("eos_token_id", "pad_token_id") if getattr(said, name) is None]
        if unsaid and pretrained_model_name_or_path is not None:
            end = end_of_text(pretrained_model_name_or_path, asked)
            for name in unsaid:
                by_config = getattr(
                    model.config, name
                )  # a caller's, which transformers passes over
                setattr(said, name, end if by_config is None else by_config)
        return loaded

    def save_pretrained(
        self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """As transformers has it, and a model card that says how to open the folder."""
        super().save_pretrained(save_directory, is_main_process, **kwargs)
        if is_main_process:
            write_card(Path(save_directory), self.retentive)

    def _init_weights(self, module: nn.Module) -> None:
        """Values for what a folder lacks, and for embeddings and heads of a new size."""
        if not any(module is own for own in self.modules()):
            for weight in module.parameters():
                nn.init.normal_(weight, 0.0, self.config.hidden_size**-0.5)
        elif not all(map(_is_initialized, module.parameters(recurse=False))):
            with guard_torch_init_functions():  # leaves alone what is initialised
                self.retentive.init_weights()
            self._mark_initialized()

    def _mark_initialized(self) -> None:
        for weight in self.parameters():
            weight._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]

    # What transformers does with a model

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers has it; takes the cache by either of its names.

        Without a prompt a document begins as others end: at the end token.
        """
        if (cache := take_cache(kwargs)) is not None:
            kwargs[CACHE] = cache
        if not args and all(kwargs.get(name) is None for name in _PROMPTS):
            kwargs["input_ids"] = self._document_start()
        return super().generate(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def train(self, mode: bool = True):
        self.retentive.training = mode
        return super().train(mode)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.retentive.config = self.config.as_native()
        return embeddings

    @property
    def gradient_checkpointing(self) -> bool:
        """Keep the inputs of blocks only; gradient_checkpointing_enable() sets it."""
        return self.retentive.checkpoint_layers

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.retentive.checkpoint_layers = on

    def _replicate_for_data_parallel(self):
        # `retentive` of a replica would still be the model on the first GPU.
        raise InputError(
            "nn.DataParallel cannot hold this model; start the program with torchrun, a process"
            " for each GPU, or set CUDA_VISIBLE_DEVICES=0"
        )

    def prepare_inputs_for_generation(
        self, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As transformers has it, without what `generate` has beside what `forward` reads."""
        for name in ("tokenizer", "position_ids"):
            kwargs.pop(name, None)
        return super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            *args, inputs_embeds=inputs_embeds, **kwargs
        )

    def _document_start(self) -> Tensor:
        ends = self.generation_config.eos_token_id  # pyright: ignore[reportOptionalMemberAccess]
        if ends is None:
            raise InputError(
                "there is no prompt and no end token to begin a document with; give input_ids, or"
                " generation_config.eos_token_id"
            )
        end = ends[0] if isinstance(ends, list) else ends
        return torch.tensor([[end]], dtype=torch.int64, device=self.device)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        *args: Any,
    ) -> None:
        super()._prepare_cache_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            generation_config, model_kwargs, generation_mode, *args
        )
        if generation_config.use_cache is not False:
            given = take_cache(model_kwargs)
            cache = RetentiveCache() if given is None else checked(given)
            if generation_config.is_assistant or generation_mode == _ASSISTED:
                cache.activate_past_recording()
            model_kwargs[CACHE] = cache


class RetentiveTransformerForCausalLM(RetentiveForCausalLM):
    """The baseline for transformers."""

    config_class = RetentiveTransformerConfig


class RetentiveQuantizedForCausalLM(RetentiveForCausalLM):
    """Refuses a folder of `retentive quantize`."""

    config_class = RetentiveQuantizedConfig

    def __init__(self, config: RetentiveConfig):
        raise InputError(
            "the weights of this model are quantised, which transformers cannot read; open it with"
            " retentive.load, or give the folder that it was made from"
        )


def _held(cache: RetentiveCache | None) -> dict[str, Any]:
    """The field of an output, by the name that transformers has for it."""
    return {CACHE: cache}


def _is_initialized(weight: Tensor) -> bool:
    return getattr(weight, "_is_hf_initialized", False)


def _one_of(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    if input_ids is None and inputs_embeds is not None:
        return inputs_embeds
    if input_ids is None or inputs_embeds is not None:
        raise InputError("give either input_ids or inputs_embeds")
    return input_ids


def _only_pads(real: Tensor | None) -> bool:
    return real is not None and not bool(real.any())


def _columns(logits_to_keep: int | Tensor | None) -> slice | Tensor:
    if isinstance(logits_to_keep, Tensor):
        return logits_to_keep
    return slice(-logits_to_keep, None) if logits_to_keep else slice(None)


def _targets(labels: Tensor, tokens: Tensor, layout: Layout) -> Tensor:
    """For each real token the label of the real token after it, -100 for the last of a row."""
    if labels.shape != tokens.shape[:2]:
        raise InputError(
            f"labels are {list(labels.shape)} for tokens {list(tokens.shape[:2])}; give one a token"
        )
    targets = F.pad(layout.unpad(labels)[:, 1:], (0, 1), value=IGNORED)
    if layout.cu_seqlens is not None:
        targets[:, layout.cu_seqlens[1:] - 1] = IGNORED
    return targets


@contextmanager
def _inputs(layers: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """What each of `layers` is given in the meantime."""
    given: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: given.append(args[0])) for layer in layers
    ]
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()
