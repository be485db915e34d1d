"""The ways of decoding that feed embeddings and a source as greedy search does. Every other one is refused by name."""

from __future__ import annotations

import copy
from typing import Any

from transformers import GenerationConfig

from layalign.utils.errors import ArgumentError, shown

# Allow lists: what a later transformers adds is refused until it has a test here (docs/decoding.md).
_MODES = ("greedy_search", "sample", "beam_search", "beam_sample")
_CACHES = (
    "dynamic", "dynamic_full", "static", "offloaded", "offloaded_static", "quantized", "sliding_window", "hybrid",
    "hybrid_chunked", "offloaded_hybrid", "offloaded_hybrid_chunked",
)  # fmt: skip

_AGAIN = "it runs the model on input_ids, where the source's slots hold a filler instead of the soft tokens"
_MODE_REASONS = {
    "contrastive_search": ("penalty_alpha", _AGAIN),
    "dola_generation": ("dola_layers", _AGAIN),
    "group_beam_search": ("num_beam_groups", "its code comes from the hub and does not know of a source"),
    "constrained_beam_search": (
        "constraints, force_words_ids", "its code comes from the hub and does not know of a source",
    ),
}  # fmt: skip
_DRAFTS = ("assistant_early_exit", "use_mtp", "speculation_type")
_DRAFT_REASON = "the drafts would be made from the filler in the source's slots; prompt_lookup_num_tokens is served"
# Arguments that must stay away, with the reason.
_REASONS = {
    "assistant_model": _DRAFT_REASON,
    "assistant_tokenizer": _DRAFT_REASON,
    "custom_generate": "another decoding loop may feed input_ids where embeddings belong, which cannot be checked",
    "negative_prompt_ids": "it is for guidance_scale, which is not served",
    "negative_prompt_attention_mask": "it is for guidance_scale, which is not served",
    "inputs_embeds": "the model makes the embeddings of input_ids and source; call model.llm.generate without a source",
    "position_ids": "they follow from attention_mask, and not every transformers continues from given ones",
    "source_states": "the source is given as encoder_input_ids, or in past_key_values",
}
_SETTING_REASONS = {
    "guidance_scale": "the pass without the prompt would have neither soft tokens nor a source",
    "prefill_chunk_size": "transformers cuts input_ids into chunks, but not their embeddings",
    "token_healing": "it rewrites the prompt from input_ids, without the source's slots",
}


def require_served(
    default: GenerationConfig, generation_config: GenerationConfig | None, past: int, given: dict[str, Any]
) -> Any:
    """The settings of a call of ``generate``, if its way of decoding works with a source.

    Args:
        default: the model's own generation configuration.
        generation_config: of this call, or None.
        past: number of tokens in the cache of this call.
        given: the other arguments, by name.

    Raises:
        ArgumentError: it does not; the text names the argument and says why.
    """
    for name, reason in _REASONS.items():
        if given.get(name) is not None:
            _refuse(name, given[name], reason)
    settings = _settings(default, generation_config, given)
    kind = getattr(settings, "cache_implementation", None)
    if kind is not None and kind not in _CACHES:
        _refuse("cache_implementation", kind, "only transformers' own caches carry a source; see layalign serve")
    for name, reason in _SETTING_REASONS.items():
        value = getattr(settings, name, None)
        if value and not (name == "guidance_scale" and value == 1):
            _refuse(name, value, reason)
    mode = str(getattr(settings.get_generation_mode(), "value", "unknown"))
    drafts = {name: getattr(settings, name, None) for name in _DRAFTS}
    if mode == "assisted_generation":
        for name, value in drafts.items():
            if value:
                _refuse(name, value, _DRAFT_REASON)
        if settings.prompt_lookup_num_tokens is None:
            _refuse("generation mode", mode, _DRAFT_REASON)
        _require_lookup(settings, past, given)
    elif mode not in _MODES:
        name, reason = _MODE_REASONS.get(mode, ("generation mode", "it has no test with a source"))
        _refuse(name, mode, reason)
    return settings


def _settings(default: GenerationConfig, generation_config: GenerationConfig | None, given: dict[str, Any]) -> Any:
    """The settings as transformers resolves them: arguments, then the call's configuration, then the model's own."""
    settings = copy.copy(default if generation_config is None else generation_config)
    for name, value in vars(default).items():
        if getattr(settings, name, None) is None:
            setattr(settings, name, value)
    for name, value in given.items():
        if hasattr(settings, name):
            setattr(settings, name, value)
    return settings


def _require_lookup(settings: Any, past: int, given: dict[str, Any]) -> None:
    """Refuse what does not work with prompt lookup: stopping rules that must see each token, and a filled cache."""
    last = "several tokens are accepted at once, and transformers checks the last of them alone"
    for name, there, reason in (
        ("stop_strings", settings.stop_strings is not None, last),
        ("stopping_criteria", given.get("stopping_criteria"), last),
        ("past_key_values", past, "the first pass would read again what the cache holds"),
    ):
        if there:
            raise ArgumentError(f"prompt_lookup_num_tokens: not served with {name}: {reason}")


def _refuse(name: str, value: Any, reason: str) -> None:
    raise ArgumentError(f"{name}: {shown(value)} is not served with a source: {reason}")
