"""Requests of OpenAI's endpoints, and the check that everything passes before it reaches the engine.

vLLM's own endpoints answer. What a body asks of LayAlign (text, language, task) goes into the source; what vLLM samples
by stays with vLLM; every other field is taken, or refused, as by `layalign serve`.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError
from vllm.renderers.inputs.preprocess import parse_model_prompt

from layalign.serving.http.messages import ApiError, ChatRequest, CompletionRequest, first_problem
from layalign.serving.vllm import MODALITY
from layalign.serving.vllm.processor import Read, refused

# Fields that vLLM answers to by itself.
OF_VLLM = {
    "n", "logprobs", "top_logprobs", "presence_penalty", "frequency_penalty", "repetition_penalty", "top_k", "min_p",
    "min_tokens", "stop", "stop_token_ids", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens",
    "include_stop_str_in_output", "logit_bias", "allowed_token_ids", "bad_words", "response_format",
    "structured_outputs", "priority", "request_id", "return_token_ids", "return_tokens_as_token_ids", "length_penalty",
    "use_beam_search", "stream_options", "cache_salt", "model",
}  # fmt: skip


def validate_inputs(original: Any, processor: Any, encoder_input: Any, decoder_input: Any) -> None:
    """Check that a request has one source, and slots for it in its prompt. `forward` could not refuse one any more."""
    original(encoder_input, decoder_input)
    places = {} if encoder_input is None else dict(decoder_input.get("mm_placeholders") or {})
    if set(places) != {MODALITY} or len(places[MODALITY]) != 1:
        raise refused(f"{MODALITY}: expected one source; see layalign.serving.vllm.source_prompt", MODALITY)
    config = processor.model_config.hf_config
    first = [] if config.llm_bos_token_id is None else [config.llm_bos_token_id]
    ids = list(decoder_input["prompt_token_ids"])
    count = (places[MODALITY][0].length + 1) * config.use_adapter
    slots = ids[len(first) : len(first) + count]
    whole = len(slots) == count and len(set(slots)) <= 1
    if ids[: len(first)] != first or not whole or not ids:
        raise refused("prompt: expected the first token and a slot for each token of the source", "prompt")


async def completion(original: Any, online: Any, request: Any, prompts: Any, **kwargs: Any) -> Any:
    """`OnlineRenderer.preprocess_cmpl`: each prompt is a text for the encoder."""
    if not all(isinstance(prompt, str) for prompt in prompts) or not prompts:
        raise refused("prompt: expected a text; token ids are not supported", "prompt")
    sources = [_checked(online, CompletionRequest, request, prompt=prompt)[1] for prompt in prompts]
    return await original(request, sources, **kwargs)


async def chat(original: Any, online: Any, request: Any, messages: Any, *args: Any, **kwargs: Any) -> Any:
    """`OnlineRenderer.preprocess_chat`: the user's message is the source, the system's the LLM's prompt."""
    body, source = _checked(online, ChatRequest, request, messages=messages)
    prompt: Any = parse_model_prompt(online.model_config, source)
    inputs = await online.renderer.render_cmpl_async([prompt], request.build_tok_params(online.model_config))
    return [{"role": "user", "content": body.text}], inputs


def _checked(online: Any, kind: Any, request: Any, **replaced: Any) -> tuple[Any, dict[str, Any]]:
    """The body as `layalign serve` reads it, and its prompt for vLLM, in which the source is tokenized already.

    Fields without a value get those of that server, also in ``request``.

    Raises:
        VLLMValidationError: it names the field.
    """
    if "max_tokens" not in type(request).model_fields:  # /tokenize, /v1/responses
        raise refused("endpoint: expected completions or chat completions, others are not supported", "endpoint")
    given = {name: getattr(request, name) for name in request.model_fields_set}
    given = {name: value for name, value in given.items() if name not in OF_VLLM} | replaced
    for name in OF_VLLM & request.model_fields_set:  # a lone surrogate does not pass to the engine
        try:
            json.dumps(getattr(request, name), ensure_ascii=False, default=vars).encode()
        except UnicodeEncodeError:
            raise refused(f"{name}: expected valid text, got a lone surrogate", name) from None
    preparer = online.renderer.get_mm_processor().info.preparer
    settings = preparer.settings
    try:
        body = kind(**given)
    except ValidationError as error:
        found = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()]
        message, field = first_problem(found)
        raise refused(message, field or "body") from None
    if body.timeout is not None:
        raise refused("timeout: expected none, vLLM has no time limits", "timeout")
    longest, name = body.longest
    if longest is not None and longest > settings.max_new_tokens:
        raise refused(f"{name}: expected at most {settings.max_new_tokens}", name)
    longest = settings.default_new_tokens if longest is None else longest
    beams = bool(getattr(request, "use_beam_search", False))
    if request.temperature is None and not beams:
        request.temperature = 0.0
    if request.max_tokens is None:
        request.max_tokens = longest
    try:
        inputs = preparer(body, longest, name)
    except ApiError as error:
        raise refused(error.detail, error.param or "body") from None
    source = Read(ids=list(inputs.source), prompt=preparer.prompt(inputs))
    return body, {"prompt_token_ids": [], "multi_modal_data": {MODALITY: source}}
