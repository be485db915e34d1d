"""Generation: the source is encoded once, before the batch is expanded, and then lives in the cache."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationMixin

from layalign.modeling.cache import SourceDynamicCache, SourceKeyValues, get_source, set_source
from layalign.modeling.decoding_modes import require_served
from layalign.modeling.finite import finite
from layalign.modeling.llm_inputs import LLMInputs
from layalign.modeling.text_only import (
    GivenCriteria,
    GivenProcessors,
    Text,
    TextCriteria,
    TextOnlyStreamer,
    takes_all_ids,
    text_processors,
    with_text,
)
from layalign.modeling.validation import require_ids, require_mask
from layalign.utils.errors import ArgumentError, refuse
from layalign.utils.versions import cache_name, generation_cache_name, take_cache


def cache_for_compiled(llm: Any, use_cache: bool | None) -> DynamicCache | None:
    """In compiled code the cache that ``llm`` would make in this call, able to carry a source; else None."""
    if not torch.compiler.is_compiling():
        return None
    config = llm.config.get_text_config(decoder=True)
    wanted = config.use_cache if use_cache is None else use_cache
    return SourceDynamicCache(config=config) if wanted else None


class SourceGenerationMixin(GenerationMixin):
    """What :class:`layalign.LayAlignForCausalLM` changes in transformers' ``generate``."""

    @finite
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

        Logits processors, stopping criteria and streamers see the text alone, ``[bos] [prompt] [new tokens]``: no
        slots, no boundary, no padding. Rows whose texts differ in length are passed in separate groups. A processor or
        criterion with an attribute ``packed_ids = True`` gets all of ``input_ids`` instead. ``max_length`` and
        ``min_length`` count the positions of ``input_ids``.

        Args:
            inputs, input_ids, attention_mask: (B, T) int64, of :meth:`build_inputs`. Without them the LLM starts right
                after the source.
            encoder_input_ids, encoder_attention_mask: (B, S) int64; may be left out when ``past_key_values``
                (``cache``) carries the source.
            **kwargs: as transformers' ``generate``: max_new_tokens, num_beams, do_sample, streamer, ...

        Returns:
            (B * num_return_sequences, T + new) int64: the LLM's input ids and the new tokens, or transformers' output
            object. ``[:, T:]`` are the new tokens.

        Raises:
            ArgumentError: the input is not laid out as :meth:`build_inputs` does, there is no source, or the decoding
                mode does not work with a source.
            NonFiniteError: the largest logit of a row was NaN or infinite before the row ended. It is raised after all
                rows have ended: the error's ``rows`` are the rows affected, its ``output`` is valid for the others.
                ``remove_invalid_values=True`` replaces such logits instead, as in transformers.
        """
        if args:
            names = list(inspect.signature(GenerationMixin.generate).parameters)[2:]  # after self and inputs
            by_position = dict(zip(names, args, strict=False))
            if twice := by_position.keys() & kwargs.keys():
                raise ArgumentError(f"{min(twice)}: expected once, got it by position and by name")
            kwargs.update(by_position)
        input_ids = inputs if input_ids is None else input_ids
        cache, past = take_cache(kwargs), 0
        if cache is not None:
            if not isinstance(cache, Cache):
                refuse("past_key_values", "a transformers cache", cache)
            kwargs[generation_cache_name()], past = cache, int(cache.get_seq_length())
        settings = require_served(self.generation_config, kwargs.get("generation_config"), past, kwargs)
        if encoder_input_ids is None:
            source = get_source(cache)
            if source is None:
                raise ArgumentError("encoder_input_ids: expected (B, S) token ids, or a cache that carries a source")
            given, text = self._go_on(input_ids, attention_mask, source, past, settings)
        else:
            if past:
                raise ArgumentError(
                    f"past_key_values: expected an empty cache with encoder_input_ids, got one of {past} tokens; leave "
                    "out encoder_input_ids and encoder_attention_mask to go on with the source that it carries"
                )
            input_ids, attention_mask, embeds, source = self._begin(
                input_ids, attention_mask, encoder_input_ids, encoder_attention_mask
            )
            given = dict(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=embeds, source_states=source)
            text = Text(self._tokens(input_ids, attention_mask), None if self.mapping is None else source.lengths)
        kwargs["logits_processor"] = with_text(GivenProcessors, text, kwargs.get("logits_processor"))
        kwargs["stopping_criteria"] = with_text(GivenCriteria, text, kwargs.get("stopping_criteria"))
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = TextOnlyStreamer(kwargs["streamer"], text, self.config.source_token_id)
        return super().generate(None, **given, **kwargs)

    def _go_on(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, source: SourceKeyValues, past: int, settings: Any
    ) -> tuple[dict[str, Any], Text]:
        """(checked arguments, text) of a sequence whose first ``past`` tokens are in a cache."""
        require_ids("input_ids", input_ids, self.get_input_embeddings())
        assert input_ids is not None
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)  # transformers would take the slots' filler for padding
        require_mask("attention_mask", attention_mask)
        if attention_mask.shape != input_ids.shape or input_ids.shape[1] <= past:
            raise ArgumentError(
                f"input_ids, attention_mask: expected the whole sequence, more than the {past} tokens in "
                f"past_key_values, got {tuple(input_ids.shape)} and {tuple(attention_mask.shape)}"
            )
        times = max(settings.num_beams or 1, settings.num_return_sequences or 1)
        if source.rows not in (None, len(input_ids) * times):
            raise ArgumentError(
                f"past_key_values: expected a cache of {len(input_ids) * times} rows, got {source.rows}; its "
                "batch_repeat_interleave and batch_select_indices change its rows"
            )
        tokens, lengths = self._tokens(input_ids, attention_mask), None
        if self.mapping is not None and source.lengths is not None:
            lengths = source.lengths[::times].to(input_ids.device)
            tokens.check(lengths, tokens.slots(lengths)[1])
        return dict(input_ids=input_ids, attention_mask=attention_mask), Text(tokens, lengths)

    def _tokens(self, input_ids: Tensor, attention_mask: Tensor) -> LLMInputs:
        config = self.config
        return LLMInputs(input_ids, attention_mask, config.llm_bos_token_id is not None, config.source_token_id)

    def _get_logits_processor(
        self,
        generation_config: Any,
        *args: Any,
        logits_processor: Any = None,
        prefix_allowed_tokens_fn: Any = None,
        **kwargs: Any,
    ) -> Any:
        given = dict(logits_processor=logits_processor, prefix_allowed_tokens_fn=prefix_allowed_tokens_fn)
        build = super()._get_logits_processor
        if not isinstance(logits_processor, GivenProcessors):  # not called by this class's `generate`
            return build(generation_config, *args, **given, **kwargs)
        return text_processors(logits_processor, build, generation_config, prefix_allowed_tokens_fn, kwargs)

    def _get_stopping_criteria(self, generation_config: Any, stopping_criteria: Any, **kwargs: Any) -> Any:
        criteria = super()._get_stopping_criteria(generation_config, stopping_criteria, **kwargs)
        if not isinstance(stopping_criteria, GivenCriteria) or all(map(takes_all_ids, criteria)):
            return criteria
        return TextCriteria(stopping_criteria.text, list(criteria))

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: transformers' continuous batching has no place for a source; ``layalign serve`` has its own.

        Raises:
            ArgumentError: always.
        """
        raise ArgumentError(
            "generate_batch: not served with a source: its cache has no place for one; "
            "`layalign serve` batches requests continuously"
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        source_states: SourceKeyValues | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The LLM's own method, because masks depend on the LLM's attention function. The cache carries the source."""
        if inputs_embeds is not None and kwargs.get("is_first_iteration"):
            more = input_ids[:, inputs_embeds.shape[1] :]  # candidates that prompt lookup tries in the first pass
            if more.shape[1]:
                inputs_embeds = torch.cat([inputs_embeds, self.get_input_embeddings()(more)], dim=1)
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
            set_source(model_kwargs[name], source)
        return result

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        source = kwargs.pop("source_states", None)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)
        if source is not None:
            model_kwargs["source_states"] = source.share(expand_size)
        return input_ids, model_kwargs
