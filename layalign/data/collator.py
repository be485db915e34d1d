"""The collator: examples in, one padded batch for the encoder and one packed batch for the LLM out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from layalign.data.examples import Example
from layalign.data.languages import tokenizer_source_language
from layalign.errors import ArgumentError, one_of, refuse, whole_number
from layalign.packing import pack

logger = logging.getLogger(__name__)
STAGES = ("translation", "task")


class LayAlignCollator:
    """Turns a list of `Example` into a batch for `LayAlignForCausalLM`.

    Args:
        encoder_tokenizer: tokenizer of the multilingual encoder. Its own special tokens are kept; M2M100 and NLLB
            tokenizers get each text's language.
        llm_tokenizer: tokenizer of the LLM. It adds nothing; the end-of-sequence token is appended to targets here.
        bos_token_id: first token of the LLM's input, or None.
        source_token_id: id that fills the slots of the encoder's tokens and the padding.
        stage: "translation" (no prompt) or "task" (the example's prompt follows the encoder's tokens).
        max_source_length, max_prompt_length, max_target_length: longest encoder input, prompt and target in tokens,
            special tokens included; what is longer is cut at its end, and a cut target keeps its end-of-sequence token.
        with_targets: append targets and give labels; False for generation.
        slots: False for a model without an adapter: no slots for the encoder's tokens.
        prompt: False for a model whose LLM reads the encoder's tokens in place of the prompt, in the task stage too.

    Raises:
        ArgumentError: an option is none of those expected, or the LLM's tokenizer cannot serve.
    """

    def __init__(
        self,
        encoder_tokenizer: Any,
        llm_tokenizer: Any,
        *,
        bos_token_id: int | None,
        source_token_id: int,
        stage: str = "translation",
        max_source_length: int = 512,
        max_prompt_length: int = 512,
        max_target_length: int = 512,
        with_targets: bool = True,
        slots: bool = True,
        prompt: bool = True,
    ) -> None:
        one_of("stage", stage, STAGES)
        for name, tokenizer in (("encoder_tokenizer", encoder_tokenizer), ("llm_tokenizer", llm_tokenizer)):
            if not callable(tokenizer) or not hasattr(tokenizer, "pad_token_id" if name[0] == "e" else "eos_token_id"):
                raise ArgumentError(f"{name}: expected a tokenizer of transformers, got {type(tokenizer).__name__}")
        if bos_token_id is not None:
            whole_number("bos_token_id", bos_token_id, least=0)
        whole_number("source_token_id", source_token_id, least=0)
        for name, length in (
            ("max_source_length", max_source_length),
            ("max_prompt_length", max_prompt_length),
            ("max_target_length", max_target_length),
        ):
            if whole_number(name, length) < 1:
                raise ArgumentError(f"{name}: expected a number >= 1, got {length}")
        if with_targets and llm_tokenizer.eos_token_id is None:
            raise ArgumentError("llm_tokenizer: expected an eos_token, with which every target ends; it has none")
        added = llm_tokenizer("", add_special_tokens=False)["input_ids"]
        if len(added):
            raise ArgumentError(f"llm_tokenizer: expected no tokens for an empty text, got {list(added)}")
        self.encoder_tokenizer = encoder_tokenizer
        self.llm_tokenizer = llm_tokenizer
        self.bos_token_id = bos_token_id
        self.source_token_id = source_token_id
        self.stage = stage
        self.max_source_length = max_source_length
        self.max_prompt_length = max_prompt_length
        self.max_target_length = max_target_length
        self.with_targets = with_targets
        self.slots, self.prompt = slots, prompt
        self._told: set[str] = set()

    @classmethod
    def from_model(cls, model: Any, encoder_tokenizer: Any, llm_tokenizer: Any, **kwargs: Any) -> LayAlignCollator:
        """A collator with the ids of a model's configuration; `kwargs` as for the constructor."""
        config: Any = getattr(model, "config", None)
        if not hasattr(config, "llm_bos_token_id") or not hasattr(config, "source_token_id"):
            raise ArgumentError(f"model: expected a LayAlign model with its config, got {type(model).__name__}")
        kwargs.setdefault("bos_token_id", config.llm_bos_token_id)
        kwargs.setdefault("source_token_id", config.source_token_id)
        kwargs.setdefault("slots", getattr(config, "adapter", True))
        kwargs.setdefault("prompt", getattr(config, "prompt", True))
        return cls(encoder_tokenizer, llm_tokenizer, **kwargs)

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Make a batch of B examples.

        Returns:
            int64 tensors on the CPU: `encoder_input_ids`, `encoder_attention_mask` (B, S), padded on the right;
            `input_ids`, `attention_mask` (B, T), padded on the left; with targets `labels` (B, T), -100 where nothing
            is predicted.

        Raises:
            ArgumentError: no examples, a source without any token, or a task example without a prompt.
        """
        if not isinstance(examples, Sequence) or not all(hasattr(example, "source") for example in examples):
            refuse("examples", "a list of Example", examples)
        if not examples:
            raise ArgumentError("examples: expected at least one, got none")
        sources = self.encode_sources(examples)
        prompts = None
        if self.stage == "task" and self.prompt:
            for example in examples:
                if not example.prompt:
                    raise ArgumentError(f"examples: {_which(example)} has no prompt, expected one for stage='task'")
            prompts = self._llm_ids([example.prompt for example in examples], self.max_prompt_length, "prompt")
        targets = None
        if self.with_targets:
            ids = self._llm_ids([example.target for example in examples], self.max_target_length - 1, "target")
            targets = [[*row, self.llm_tokenizer.eos_token_id] for row in ids]
        packed = pack(
            [len(row) for row in sources],
            prompts,
            targets,
            bos_token_id=self.bos_token_id,
            source_token_id=self.source_token_id,
            slots=self.slots,
        )
        return {**self._padded(sources), **packed}

    def encode_sources(self, examples: Sequence[Example]) -> list[list[int]]:
        """Encoder token ids of each source, special tokens included, cut to `max_source_length`, not padded."""
        codes = [tokenizer_source_language(self.encoder_tokenizer, example.language) for example in examples]
        rows: list[list[int]] = [[] for _ in examples]
        for code in dict.fromkeys(codes):
            places = [i for i, other in enumerate(codes) if other == code]
            with _source_language(self.encoder_tokenizer, code):
                ids = self.encoder_tokenizer(
                    [examples[i].source for i in places], truncation=True, max_length=self.max_source_length
                )["input_ids"]
            for i, row in zip(places, ids, strict=True):
                rows[i] = list(row)
        for example, row in zip(examples, rows, strict=True):
            if not row:
                raise ArgumentError(f"examples: {_which(example)} has no encoder tokens, expected a source text")
        return rows

    def _llm_ids(self, texts: list[str], longest: int, what: str) -> list[list[int]]:
        ids = self.llm_tokenizer(texts, add_special_tokens=False)["input_ids"]
        cut = sum(len(row) > longest for row in ids)
        if cut and what not in self._told:
            self._told.add(what)
            logger.warning("%d %s(s) of a batch cut to max_%s_length; said only once", cut, what, what)
        return [list(row[:longest]) for row in ids]

    def _padded(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        # Without a pad token any id does: the mask hides it.
        pad = self.encoder_tokenizer.pad_token_id
        pad = 0 if pad is None else pad
        width = max(map(len, rows))
        ids = [row + [pad] * (width - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        return {
            "encoder_input_ids": torch.tensor(ids, dtype=torch.long),
            "encoder_attention_mask": torch.tensor(mask, dtype=torch.long),
        }


def _which(example: Example) -> str:
    return f"the {example.language} example {example.id!r}"


@contextmanager
def _source_language(tokenizer: Any, code: str | None) -> Iterator[None]:
    """Set a tokenizer's source language for a while."""
    if code is None:
        yield
        return
    before = tokenizer.src_lang
    tokenizer.src_lang = code
    try:
        yield
    finally:
        tokenizer.src_lang = before
