"""Turns a request's text into model inputs, and checks the limits."""

from __future__ import annotations

from typing import Any

from layalign.data.collator import LayAlignCollator
from layalign.data.examples import Example
from layalign.data.languages import find_language
from layalign.data.records import PROMPTS
from layalign.modeling.tokenization import Prompt
from layalign.serving.http.decoding import Inputs
from layalign.serving.http.messages import ApiError, ChatRequest, CompletionRequest
from layalign.serving.http.settings import ServeSettings
from layalign.utils.errors import ArgumentError


class Preparer:
    """Tokenizes requests. Not thread-safe, since tokenizers are not.

    Args:
        model: a `LayAlignForCausalLM`.
        encoder_tokenizer, llm_tokenizer: its tokenizers.
        settings: the limits.
        context: most tokens of prompt and answer together. None: those that the LLM was made for.
    """

    def __init__(
        self,
        model: Any,
        encoder_tokenizer: Any,
        llm_tokenizer: Any,
        settings: ServeSettings,
        context: int | None = None,
    ) -> None:
        self.settings = settings
        self.context = context or getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        self.collators = {
            stage: LayAlignCollator.from_model(
                model, encoder_tokenizer, llm_tokenizer, stage=stage, with_targets=False,
                max_source_length=settings.max_source_tokens, max_prompt_length=settings.max_prompt_tokens,
                llm_positions=None,  # checked below, together with the new tokens
            )
            for stage in ("translation", "task")
        }  # fmt: skip
        for collator in self.collators.values():
            collator.quiet = True  # texts that are too long are refused, so it need not warn

    def __call__(self, body: CompletionRequest | ChatRequest, new_tokens: int, limit: str) -> Inputs:
        """The model inputs for a request.

        Args:
            body: its fields; None in `language` and `task` is the server's default.
            new_tokens: maximum length of the answer, which must fit after the prompt.
            limit: name of the field that sets `new_tokens`, for errors.

        Raises:
            ApiError: 400; it names the field.
        """
        field = "messages" if isinstance(body, ChatRequest) else "prompt"
        inputs = self.inputs(body.text, body.language, body.task, body.llm_prompt, field)
        if len(inputs.packed) + new_tokens > self.context:
            taken = len(inputs.packed)
            room = f"{max(self.context - taken, 0)} (the prompt takes {taken} of {self.context} positions)"
            message = f"{limit}: expected at most {room}, got {new_tokens}"
            raise ApiError(400, message, limit, "context_length_exceeded")
        return inputs

    def inputs(
        self, text: str, language: str | None, task: str | None, llm_prompt: str | None, field: str = "prompt"
    ) -> Inputs:
        """The model inputs for a text.

        Args:
            text: for the encoder.
            language, task, llm_prompt: fields of a request; None is the server's default.
            field: name of the field with the text, for errors.

        Raises:
            ApiError: 400; it names the field.
        """
        source, name = self._text(text, field), self._language(language)
        prompt = self._prompt(source, task, llm_prompt)
        example = Example(source=source, target="", language=name, prompt=prompt)
        collator = self.collators["task" if prompt else "translation"]
        try:
            batch = collator([example])
        except ArgumentError as error:
            blamed = "language" if str(error).startswith("language:") else field
            message = str(error).removeprefix("language: ") if blamed == "language" else "no tokens in this text"
            raise ApiError(400, f"{blamed}: {message}", blamed) from None
        inputs = Inputs(tuple(batch["encoder_input_ids"][0].tolist()), tuple(batch["input_ids"][0].tolist()))
        # Texts that are too long are refused, never truncated.
        if "source" in collator.last_cut[0]:
            most = collator.max_source_length
            raise ApiError(400, f"{field}: expected at most {most} encoder tokens", field, "too_long")
        if "prompt" in collator.last_cut[0]:
            blamed = field if llm_prompt is None else "llm_prompt"
            most = self.settings.max_prompt_tokens
            raise ApiError(400, f"{blamed}: expected at most {most} LLM tokens", blamed, "too_long")
        return inputs

    def prompt(self, inputs: Inputs) -> list[int]:
        """The LLM's input after the boundary."""
        collator = self.collators["task"]
        return list(inputs.packed[int(collator.bos_token_id is not None) + (len(inputs.source) + 1) * collator.slots :])

    def text(self, inputs: Inputs) -> list[int]:
        """The LLM's input without the source's slots and the boundary; the repetition penalty counts these tokens."""
        first = self.collators["task"].bos_token_id
        return [*([] if first is None else [first]), *self.prompt(inputs)]

    def _text(self, text: str, field: str) -> str:
        if len(text) > self.settings.max_characters:
            most = self.settings.max_characters
            raise ApiError(400, f"{field}: expected at most {most} characters, got {len(text)}", field, "too_long")
        text = text.strip()
        if not text:
            raise ApiError(400, f"{field}: expected a text, got an empty one", field)
        return text

    def _language(self, language: str | None) -> str:
        found = find_language(language or self.settings.language) if language != "" else None
        if found is None:
            expected = "an English name or a language code such as 'Swahili', 'sw' or 'swh'"
            raise ApiError(400, f"language: expected {expected}", "language")
        return found.name

    def _prompt(self, source: str, task: str | None, llm_prompt: str | None) -> str:
        if llm_prompt is None:
            task = self.settings.task if task is None else task
            if task not in PROMPTS:
                raise ApiError(400, f"task: expected one of {', '.join(PROMPTS)}", "task")
            return PROMPTS[task](source)
        if task is not None:
            raise ApiError(400, "llm_prompt: give either task or llm_prompt, not both", "llm_prompt")
        size = len(llm_prompt) + llm_prompt.count("{source}") * len(source)  # may be too large to build
        most = 2 * self.settings.max_characters
        if not llm_prompt.strip() or size > most:
            message = f"llm_prompt: expected 1 to {most} characters, including the text that replaces {{source}}"
            raise ApiError(400, message, "llm_prompt")
        return Prompt.fill(llm_prompt, source)
