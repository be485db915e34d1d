"""From examples to answers: greedy generation in batches, by a LayAlign model or by its LLM alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from layalign.data.collator import LayAlignCollator
from layalign.data.examples import Example
from layalign.errors import ArgumentError, whole_number


class ModelAnswers:
    """Answers of a LayAlign model. Called with examples, it gives one text for each.

    Args:
        model: has `generate` as `LayAlignForCausalLM` does.
        collator: made with `with_targets=False`.
        max_new_tokens: longest answer.
        options: further arguments of `generate`; without any, greedy search.
    """

    def __init__(
        self, model: Any, collator: LayAlignCollator, max_new_tokens: int, options: Mapping[str, Any] | None = None
    ) -> None:
        self.model, self.collator = model, collator
        self.max_new_tokens, self.options = max_new_tokens, dict(options or {})

    def __call__(self, examples: Sequence[Example]) -> list[str]:
        device = _device(self.model)
        batch = {name: tensor.to(device) for name, tensor in self.collator(examples).items()}
        with evaluation_mode(self.model), torch.no_grad():
            return _generate(self.model, self.collator.llm_tokenizer, batch, self.max_new_tokens, self.options)


class LlmAnswers:
    """Answers of an LLM that gets the prompt as text; see `llm_alone`."""

    def __init__(
        self, llm: Any, tokenizer: Any, max_new_tokens: int, max_prompt_length: int, options: Mapping[str, Any]
    ) -> None:
        self.llm, self.tokenizer = llm, tokenizer
        self.max_new_tokens, self.max_prompt_length, self.options = max_new_tokens, max_prompt_length, dict(options)

    @property
    def fingerprint(self) -> str:
        """Changes with the weights and the settings."""
        options = sorted((key, repr(value)) for key, value in self.options.items())
        return f"llm alone {model_fingerprint(self.llm)} {self.max_new_tokens} {self.max_prompt_length} {options}"

    def __call__(self, examples: Sequence[Example]) -> list[str]:
        rows = self.tokenizer([example.prompt or example.source for example in examples])["input_ids"]
        if self._adds_eos():
            rows = [row[:-1] for row in rows]
        rows = [list(row)[-self.max_prompt_length :] for row in rows]
        width, pad, device = max(map(len, rows)), pad_id(self.tokenizer), _device(self.llm)
        batch = {
            "input_ids": torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device),
            "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device),
        }
        with evaluation_mode(self.llm), torch.no_grad():
            return _generate(self.llm, self.tokenizer, batch, self.max_new_tokens, self.options)

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
        A callable from examples to answers. An example without a prompt is asked by its source.
    """
    if not hasattr(llm, "generate") or not hasattr(llm, "parameters"):
        raise ArgumentError(f"llm: expected a causal language model of transformers, got {type(llm).__name__}")
    if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):
        raise ArgumentError(f"tokenizer: expected one of transformers, got {type(tokenizer).__name__}")
    whole_number("max_new_tokens", max_new_tokens, least=1)
    whole_number("max_prompt_length", max_prompt_length, least=1)
    return LlmAnswers(llm, tokenizer, max_new_tokens, max_prompt_length, generation)


def _generate(
    model: Any, tokenizer: Any, batch: Mapping[str, torch.Tensor], max_new_tokens: int, options: Mapping[str, Any]
) -> list[str]:
    ends = eos_ids(model, tokenizer)
    arguments: dict[str, Any] = {"do_sample": False, "pad_token_id": pad_id(tokenizer), **options}
    if ends:
        arguments.setdefault("eos_token_id", ends)
    rows, width = model.generate(**batch, max_new_tokens=max_new_tokens, **arguments), batch["input_ids"].shape[1]
    if len(rows) != len(batch["input_ids"]):
        raise ArgumentError(f"generation: expected one answer each for {len(batch['input_ids'])}, got {len(rows)}")
    texts = []
    for row in rows[:, width:].tolist():
        # Behind the first end there is only padding, and the padding may be an ordinary token.
        end = next((i for i, token in enumerate(row) if token in ends), len(row))
        texts.append(tokenizer.decode(row[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return texts


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
