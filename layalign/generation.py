"""Generation: the source is encoded once, before the batch is expanded, and then lives in the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin

from layalign._versions import cache_name, generation_cache_name, take_cache
from layalign.errors import ArgumentError
from layalign.source import SourceDynamicCache, SourceStates, get_source, put_source


def cache_for_compiled(llm: Any, use_cache: bool | None) -> DynamicCache | None:
    """The cache that ``llm`` would make by itself in this call, but one for a source; None outside compiled code."""
    if not torch.compiler.is_compiling():
        return None
    config = llm.config.get_text_config(decoder=True)
    wanted = config.use_cache if use_cache is None else use_cache
    return SourceDynamicCache(config=config) if wanted else None


class SourceGenerationMixin(GenerationMixin):
    """What :class:`layalign.LayAlignForCausalLM` changes in transformers' ``generate``."""

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        *args: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_input_ids: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' ``generate`` with a source.

        Args:
            inputs, input_ids, attention_mask: (B, T) int64, packed (:meth:`pack`); left out, the LLM starts right after
                the source.
            encoder_input_ids, encoder_attention_mask: (B, S) int64; may be left out when ``past_key_values``
                (``cache``) carries the source.
            **kwargs: as transformers' ``generate``: max_new_tokens, num_beams, do_sample, streamer, ...

        Returns:
            (B * num_return_sequences, T + new) int64: the packed input and the new tokens, or transformers' output
            object. ``[:, T:]`` are the new tokens.
        """
        input_ids = inputs if input_ids is None else input_ids
        cache = take_cache(kwargs)
        if cache is not None:
            kwargs[generation_cache_name()] = cache
        if encoder_input_ids is None:
            if get_source(cache) is None:
                raise ArgumentError("encoder_input_ids: expected (B, S) token ids, or a cache that carries a source")
            if attention_mask is None and input_ids is not None:
                attention_mask = torch.ones_like(input_ids)  # transformers would take the slots' filler for padding
            return super().generate(None, *args, input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        input_ids, attention_mask, embeds, source = self._begin(
            input_ids, attention_mask, encoder_input_ids, encoder_attention_mask
        )
        return super().generate(
            None,
            *args,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=embeds,
            source_states=source,
            **kwargs,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        source_states: SourceStates | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The LLM's own preparation (its masks follow its attention function); the cache brings the source."""
        prepare = self.llm.prepare_inputs_for_generation
        if (cache := take_cache(kwargs)) is not None:
            kwargs[cache_name(prepare)] = cache
        return prepare(input_ids, inputs_embeds=inputs_embeds, **kwargs)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> Any:
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        source = model_kwargs.pop("source_states", None)
        if source is not None:
            name = generation_cache_name()
            if model_kwargs.get(name) is None:  # older transformers leave it to the model
                model_kwargs[name] = DynamicCache(config=self.config.get_text_config(decoder=True))
            put_source(model_kwargs[name], source)
        return result

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        source = kwargs.pop("source_states", None)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)
        if source is not None:
            model_kwargs["source_states"] = source.repeat(expand_size)
        return input_ids, model_kwargs
