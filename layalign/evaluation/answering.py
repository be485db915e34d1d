"""From examples to answers: greedy generation in batches, by a LayAlign model or by its LLM alone."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from layalign.data.collator import LayAlignCollator
from layalign.data.examples import Example
from layalign.data.lengths import positions
from layalign.errors import ArgumentError, NonFiniteError, whole_number
from layalign.finite import generate_finite
from layalign.generation import SourceGenerationMixin
from layalign.tokenization import encode_texts


class ModelAnswers:
    """Answers of a LayAlign model. Called with examples, it gives one text for each, None where its logits were NaN.

    Args:
        model: has `generate` as `LayAlignForCausalLM` does.
        collator: made with `with_targets=False`.
        max_new_tokens: longest answer.
        options: further arguments of `generate`; without any, greedy search.

    Attributes:
        last_cut: of each example of the last call, what was cut: some of "source", "prompt", "answer" (it came to no
            end within `max_new_tokens`), and "context" where all of it is longer than the LLM's positions.
    """

    def __init__(
        self, model: Any, collator: LayAlignCollator, max_new_tokens: int, options: Mapping[str, Any] | None = None
    ) -> None:
        self.model, self.collator = model, collator
        self.max_new_tokens, self.options = max_new_tokens, dict(options or {})
        self.last_cut: list[tuple[str, ...]] = []

    def __call__(self, examples: Sequence[Example]) -> list[str | None]:
        device = _device(self.model)
        batch = {name: tensor.to(device) for name, tensor in self.collator(examples).items()}
        with evaluation_mode(self.model), torch.no_grad():
            limit = self.collator.llm_positions, self.collator.llm_positions_end
            answers = _generate(
                self.model, self.collator.llm_tokenizer, batch, self.max_new_tokens, self.options, limit
            )
        self.last_cut = _with_answers(self.collator.last_cut, answers)
        return [answer.text for answer in answers]


class LlmAnswers:
    """Answers of an LLM that gets the prompt as text; see `llm_alone`."""

    def __init__(
        self, llm: Any, tokenizer: Any, max_new_tokens: int, max_prompt_length: int, options: Mapping[str, Any]
    ) -> None:
        self.llm, self.tokenizer = llm, tokenizer
        self.max_new_tokens, self.max_prompt_length, self.options = max_new_tokens, max_prompt_length, dict(options)
        self.last_cut: list[tuple[str, ...]] = []  # as that of `ModelAnswers`

    @property
    def fingerprint(self) -> str:
        """Changes with the weights and the settings."""
        options = sorted((key, repr(value)) for key, value in self.options.items())
        return f"llm alone {model_fingerprint(self.llm)} {self.max_new_tokens} {self.max_prompt_length} {options}"

    def __call__(self, examples: Sequence[Example]) -> list[str | None]:
        texts = [example.prompt or example.source for example in examples]
        rows = [text.ids for text in encode_texts(self.tokenizer, texts, special=True)]
        if self._adds_eos():
            rows = [row[:-1] for row in rows]
        cut = [("prompt",) if len(row) > self.max_prompt_length else () for row in rows]
        rows = [row[-self.max_prompt_length :] for row in rows]
        width, pad, device = max(map(len, rows)), pad_id(self.tokenizer), _device(self.llm)
        batch = {
            "input_ids": torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device),
            "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device),
        }
        with evaluation_mode(self.llm), torch.no_grad():
            limit = positions(self.llm, getattr(self.llm, "config", None))
            answers = _generate(self.llm, self.tokenizer, batch, self.max_new_tokens, self.options, limit)
        self.last_cut = _with_answers(cut, answers)
        return [answer.text for answer in answers]

    def _adds_eos(self) -> bool:
        # An answer cannot follow an end-of-sequence token.
        probe = self.tokenizer("a")["input_ids"]
        return len(probe) > 1 and probe[-1] == self.tokenizer.eos_token_id


def llm_alone(
    llm: Any, tokenizer: Any, *, max_new_tokens: int = 512, max_prompt_length: int = 512, **generation: Any
) -> LlmAnswers:
    """The baseline without an encoder: something to give to `evaluate` that asks the LLM with the prompt as text.

    Args:
        llm: a causal language model of transformers.
        tokenizer: its tokenizer, which adds its own special tokens, save one at the end.
        max_new_tokens: longest answer.
        max_prompt_length: longer prompts lose their start (the end asks for the answer).
        **generation: further arguments of `generate`; without any, greedy search.

    Returns:
        A callable from examples to answers, None where the LLM's logits were not finite. An example without a prompt is
        asked by its source.
    """
    if not hasattr(llm, "generate") or not hasattr(llm, "parameters"):
        raise ArgumentError(f"llm: expected a causal language model of transformers, got {type(llm).__name__}")
    if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):
        raise ArgumentError(f"tokenizer: expected one of transformers, got {type(tokenizer).__name__}")
    whole_number("max_new_tokens", max_new_tokens, least=1)
    whole_number("max_prompt_length", max_prompt_length, least=1)
    return LlmAnswers(llm, tokenizer, max_new_tokens, max_prompt_length, generation)


class _Answer(NamedTuple):
    """A text, whether it came to its end within the tokens allowed, and whether all fits into the LLM's positions.

    The text is None where the logits were not finite.
    """

    text: str | None
    ended: bool
    fits: bool


def _with_answers(cut: Sequence[tuple[str, ...]], answers: Sequence[_Answer]) -> list[tuple[str, ...]]:
    found = []
    for kinds, answer in zip(cut, answers, strict=True):
        beyond = () if answer.fits or "context" in kinds else ("context",)
        found.append((*kinds, *beyond, *(() if answer.ended else ("answer",))))
    return found


def _generate(
    model: Any,
    tokenizer: Any,
    batch: Mapping[str, torch.Tensor],
    max_new_tokens: int,
    options: Mapping[str, Any],
    limit: tuple[int | None, bool] = (None, False),
) -> list[_Answer]:
    """Answers to a batch, their text None where logits were not finite.

    `limit` is the LLM's positions and whether it has no more (`layalign.data.lengths`).
    """
    lengths, (most, end_of_table) = batch["attention_mask"].sum(dim=1).tolist(), limit
    if most is not None and end_of_table:
        # The last token is written and not read.
        max_new_tokens = min(max_new_tokens, most - max(lengths) + 1)
        if max_new_tokens < 1:
            raise ArgumentError(f"examples: expected at most the LLM's {most} positions, one has {max(lengths)} tokens")
    ends = eos_ids(model, tokenizer)
    arguments: dict[str, Any] = {"do_sample": False, "pad_token_id": pad_id(tokenizer), **options}
    if ends:
        arguments.setdefault("eos_token_id", ends)
    asked = arguments.get("eos_token_id")
    stops = {*ends, *(asked if isinstance(asked, list | tuple) else [asked])}
    generate = model.generate
    if hasattr(model, "generation_config") and not isinstance(model, SourceGenerationMixin):  # ours looks by itself
        generate = functools.partial(generate_finite, generate, model.generation_config)
    failed: tuple[int, ...] = ()
    try:
        rows = generate(**batch, max_new_tokens=max_new_tokens, **arguments)
    except NonFiniteError as error:
        rows, failed = error.output, error.rows
    width = batch["input_ids"].shape[1]
    if len(rows) != len(batch["input_ids"]):
        raise ArgumentError(f"generation: expected one answer each for {len(batch['input_ids'])}, got {len(rows)}")
    answers = []
    for number, (row, length) in enumerate(zip(rows[:, width:].tolist(), lengths, strict=True)):
        if number in failed:
            answers.append(_Answer(None, True, True))
            continue
        # Behind the first end there is only padding, and the padding may be an ordinary token.
        end = next((i for i, token in enumerate(row) if token in ends), len(row))
        text = tokenizer.decode(row[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ended = len(row) < max_new_tokens or not stops.isdisjoint(row)
        answers.append(_Answer(text, ended, most is None or length + end <= most + 1))
    return answers


def eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """Token ids that end an answer: the tokenizer's, and those of the model's generation configuration."""
    ids: list[int] = []
    for value in (tokenizer.eos_token_id, getattr(getattr(model, "generation_config", None), "eos_token_id", None)):
        ids += value if isinstance(value, list | tuple) else [] if value is None else [value]
    return list(dict.fromkeys(int(value) for value in ids))


def pad_id(tokenizer: Any) -> int:
    """The id that fills padding: the tokenizer's pad, else its end, else 0."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def _device(model: Any) -> torch.device:
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
    return next((parameter.device for parameter in parameters), torch.device("cpu"))


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Put a module and all its parts into eval mode, and afterwards each back into the mode it was in."""
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    before = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training


def model_fingerprint(model: Any) -> str:
    """A short text that changes when weights change: a hash of up to 64 numbers spread over each parameter."""
    if hasattr(model, "fingerprint"):
        return str(model.fingerprint)
    if not isinstance(model, torch.nn.Module):
        return str(getattr(model, "__qualname__", type(model).__qualname__))
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        if flat.numel() and not flat.is_meta:
            sample = flat[:: max(1, flat.numel() // 64)][:64]
            digest.update(sample.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


def settings_fingerprint(model: Any) -> str:
    """A short text that changes with the settings, beside the weights, that decide what a LayAlign model answers."""
    keys = (
        "encoder_layers",
        "language_layers",
        "structure",
        "mix",
        "prompt",
        "mask_encoder_padding",
        "llm_bos_token_id",
    )
    config, generation = getattr(model, "config", None), getattr(model, "generation_config", None)
    values = {key: getattr(config, key, None) for key in keys}
    if generation is not None:
        values.update(generation.to_diff_dict())
        values.pop("transformers_version", None)
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]
