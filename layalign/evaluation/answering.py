"""From examples to answers: greedy generation in batches, by a LayAlign model or by its LLM alone."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from layalign.data.examples import Example
from layalign.data.lengths import positions
from layalign.data.prompts import few_shot_prompt, one_line
from layalign.data.readers import by_language
from layalign.evaluation.shared_start import read_start
from layalign.modeling.finite import generate_finite
from layalign.modeling.generation import SourceGenerationMixin
from layalign.modeling.llm_inputs import build_inputs, real_positions
from layalign.modeling.tokenization import encode_texts, eos_ids, pad_id
from layalign.utils.errors import ArgumentError, NonFiniteError, refuse, shown, whole_number
from layalign.utils.moved import with_old_names
from layalign.utils.versions import generation_cache_name

logger = logging.getLogger(__name__)


class _Answers:
    """Answers of a model. Called with examples, it gives one text for each, None where its logits were NaN.

    Args:
        model: has `generate` as transformers' models do.
        collator: makes its batches.
        max_new_tokens: longest answer.
        options: further arguments of `generate`; without any, greedy search.

    Attributes:
        last_cut: of each example of the last call, what was cut: some of "source", "prompt", "answer" (it came to no
            end within `max_new_tokens`), and "context" where all of it is longer than the LLM's positions.
    """

    def __init__(
        self, model: Any, collator: Any, max_new_tokens: int, options: Mapping[str, Any] | None = None
    ) -> None:
        self.model, self.collator = model, collator
        self.max_new_tokens, self.options = max_new_tokens, dict(options or {})
        self.last_cut: list[tuple[str, ...]] = []

    def _texts(
        self, tokenizer: Any, batch: Mapping[str, torch.Tensor], options: Mapping[str, Any], until: Sequence[str] = ()
    ) -> list[str | None]:
        limit = self.collator.llm_positions, self.collator.llm_positions_end
        answers = _generate(self.model, tokenizer, batch, self.max_new_tokens, options, limit, until)
        self.last_cut = []
        for kinds, answer in zip(self.collator.last_cut, answers, strict=True):
            beyond = () if answer.fits or "context" in kinds else ("context",)
            self.last_cut.append((*kinds, *beyond, *(() if answer.ended else ("answer",))))
        return [answer.text for answer in answers]


class ModelAnswers(_Answers):
    """Answers of a LayAlign model; its collator is one made with `with_targets=False`."""

    def __call__(self, examples: Sequence[Example]) -> list[str | None]:
        device = device_of(self.model)
        batch = {name: tensor.to(device) for name, tensor in self.collator(examples).items()}
        with evaluation_mode(self.model), torch.no_grad():
            return self._texts(self.collator.llm_tokenizer, batch, self.options)


class PromptCollator:
    """Turns examples into a batch for an LLM that reads the prompt as text, without an encoder.

    Args:
        tokenizer: the LLM's, which adds its own special tokens, save one at the end.
        max_prompt_length: longer prompts lose their start (the end asks for the answer).
        shots: by language, the translations that stand before each of its questions, as
            `layalign.data.prompts.few_shot_prompt` writes them. Without any, the LLM gets the example's prompt, or its
            source where it has none.
        llm_positions: most tokens that the LLM was made for; None is no limit.
        llm_positions_end: whether that is a hard limit (a table of positions).

    Attributes:
        last_cut: of each example of the last call ("prompt",) where its prompt was cut, else ().
        end: the text that ends an answer: a line break after examples, else None, for the end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_prompt_length: int = 512,
        shots: Mapping[str, Sequence[Example]] | None = None,
        llm_positions: int | None = None,
        llm_positions_end: bool = False,
    ) -> None:
        self.tokenizer, self.max_prompt_length, self.shots = tokenizer, max_prompt_length, shots
        self.llm_positions, self.llm_positions_end = llm_positions, llm_positions_end
        self.end = "\n" if shots else None
        self._told = False
        self.last_cut: list[tuple[str, ...]] = []

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """A batch with targets: `input_ids`, `attention_mask`, `position_ids` and `labels`, all (B, T) int64.

        Padded on the left; labels are -100 where nothing is predicted. A target is what `continuations` gives.
        """
        targets = [self.continuations(example, [example.target])[0] for example in examples]
        return self._padded(self._context_ids(examples), targets)

    def contexts(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """The batch up to where the answers begin, without `labels`."""
        return self._padded(self._context_ids(examples), None)

    def continuations(self, example: Example, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text as the answer to `example`, after a space and with the answer's end.

        A text is split into tokens together with its prompt, as lm-evaluation-harness does.
        """
        before, eos = self._text(example), self.tokenizer.eos_token_id
        if self.end is None and eos is None:
            raise ArgumentError("tokenizer: expected an eos_token, with which every answer ends; it has none")
        whole = [f"{before} {one_line(text) + self.end if self.end else text}" for text in texts]
        length, *found = (text.ids for text in encode_texts(self.tokenizer, [before, *whole]))
        return [ids[len(length) :] + ([] if self.end else [eos]) for ids in found]

    def _text(self, example: Example) -> str:
        if not self.shots:
            return example.prompt or example.source
        if example.language not in self.shots:
            known = ", ".join(self.shots)
            raise ArgumentError(f"examples: expected some in {example.language}, which is asked; got {known}")
        shots = self.shots[example.language]
        if any(shot.source == example.source for shot in shots):
            raise ArgumentError(f"examples: expected none that is asked, got {shown(example.source)}")
        pairs = [(shot.source, shot.target) for shot in shots]
        return few_shot_prompt(pairs, example.source, example.language)

    def _context_ids(self, examples: Sequence[Example]) -> list[list[int]]:
        rows = [text.ids for text in encode_texts(self.tokenizer, [self._text(e) for e in examples], special=True)]
        if self._adds_eos():
            rows = [row[:-1] for row in rows]
        self.last_cut = [("prompt",) if len(row) > self.max_prompt_length else () for row in rows]
        if any(self.last_cut) and not self._told:
            self._told = True
            logger.warning(
                "a prompt lost its start, to fit max_prompt_length=%d; said only once", self.max_prompt_length
            )
        return [row[-self.max_prompt_length :] for row in rows]

    def _padded(self, contexts: list[list[int]], targets: list[list[int]] | None) -> dict[str, torch.Tensor]:
        batch = build_inputs(
            [0] * len(contexts), contexts, targets,
            bos_token_id=None, source_token_id=pad_id(self.tokenizer), slots=False,
        )  # fmt: skip
        return {**batch, "position_ids": real_positions(batch["attention_mask"])}

    def _adds_eos(self) -> bool:
        # An answer cannot follow an end-of-sequence token.
        probe = self.tokenizer("a")["input_ids"]
        return len(probe) > 1 and probe[-1] == self.tokenizer.eos_token_id


class LlmAnswers(_Answers):
    """Answers of an LLM that gets the prompt as text; see `llm_alone`."""

    @property
    def llm(self) -> Any:
        """The model. It and `collator`, a `PromptCollator`, are what `layalign.evaluation.likelihood` takes."""
        return self.model

    @property
    def fingerprint(self) -> str:
        """Changes with the weights and the settings."""
        options = sorted((key, repr(value)) for key, value in self.options.items())
        text = f"llm alone {model_fingerprint(self.llm)} {self.max_new_tokens} {self.collator.max_prompt_length}"
        if self.collator.shots:
            shots = [(e.language, e.source, e.target) for of in self.collator.shots.values() for e in of]
            text += f" {hashlib.sha256(json.dumps(shots).encode()).hexdigest()[:16]}"
        return f"{text} {options}"

    def __call__(self, examples: Sequence[Example]) -> list[str | None]:
        tokenizer, device = self.collator.tokenizer, device_of(self.llm)
        contexts = self.collator.contexts(examples)
        batch = {name: contexts[name].to(device) for name in ("input_ids", "attention_mask")}
        options, end = dict(self.options), self.collator.end
        with evaluation_mode(self.llm), torch.no_grad():
            if self._shares():
                batch, cache = read_start(self.llm, batch)
                if cache is not None:
                    options[generation_cache_name()] = cache
                    del batch["position_ids"]  # generate makes its own
            texts = self._texts(tokenizer, batch, options, [] if end is None else [end])
        return [text if text is None or end is None else text.split(end)[0].strip() for text in texts]

    def _shares(self) -> bool:
        """Whether the examples before the questions are read once: with greedy search and a cache that grows."""
        settings = getattr(self.llm, "generation_config", None)
        if settings is None or self.options or not self.collator.shots:
            return False
        asked = [getattr(settings, name, None) for name in ("num_beams", "cache_implementation", "use_cache")]
        return asked[0] in (None, 1) and asked[1] is None and asked[2] is not False


def llm_alone(
    llm: Any,
    tokenizer: Any,
    *,
    examples: Sequence[Example] = (),
    max_new_tokens: int = 512,
    max_prompt_length: int = 512,
    **generation: Any,
) -> LlmAnswers:
    """The baseline without an encoder, for `evaluate`: the LLM alone, which gets the prompt as text.

    Args:
        llm: a causal language model of transformers.
        tokenizer: its tokenizer, which adds its own special tokens, save one at the end.
        examples: translations into English, some for every language of the questions. Those of a question's language
            stand before it (few-shot, `layalign.data.prompts.few_shot_prompt`), in place of the question's own prompt.
            An answer then ends at its first line break.
        max_new_tokens: longest answer.
        max_prompt_length: longer prompts lose their start (the end asks for the answer).
        **generation: further arguments of `generate`; without any, greedy search.

    Returns:
        A callable from examples to answers, None where the LLM's logits were not finite. Without `examples`, the LLM
        gets a question's source where it has no prompt. The attributes `llm` and `collator` are what
        `layalign.evaluation.likelihood` takes.

    Raises:
        ArgumentError: an argument is none of those expected; in a call, a language without examples, or a question
            that is among them.
    """
    if not hasattr(llm, "generate") or not hasattr(llm, "parameters"):
        raise ArgumentError(f"llm: expected a causal language model of transformers, got {type(llm).__name__}")
    if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):
        raise ArgumentError(f"tokenizer: expected one of transformers, got {type(tokenizer).__name__}")
    if not isinstance(examples, Sequence) or not all(isinstance(example, Example) for example in examples):
        refuse("examples", "a list of Example", examples)
    whole_number("max_new_tokens", max_new_tokens, least=1)
    whole_number("max_prompt_length", max_prompt_length, least=1)
    shots = {name: list(group) for name, group in by_language(examples).items()} if examples else None
    limit = positions(llm, getattr(llm, "config", None))
    return LlmAnswers(llm, PromptCollator(tokenizer, max_prompt_length, shots, *limit), max_new_tokens, generation)


class StopStrings(StoppingCriteria):
    """Stops each row once a stop string is in its output; the input does not count.

    Args:
        tokenizer: of the LLM.
        until: the stop strings.
        width: tokens of the input, padding included.
    """

    packed_ids = True  # as `width` counts them

    def __init__(self, tokenizer: Any, until: Sequence[str], width: int) -> None:
        self.tokenizer, self.until, self.width = tokenizer, until, width
        # A token is at least a byte of the text, save a few that mark spaces or begin in the middle of a character.
        self.tail = max(len(text.encode()) for text in until) + 8

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """(B, T) ids -> (B,) bool."""
        written = input_ids[:, self.width :][:, -self.tail :]
        texts = self.tokenizer.batch_decode(written, clean_up_tokenization_spaces=False)
        done = [any(stop in text for stop in self.until) for text in texts]
        return torch.tensor(done, device=input_ids.device)


class _Answer(NamedTuple):
    """A text, whether it came to its end within the tokens allowed, and whether all fits into the LLM's positions.

    The text is None where the logits were not finite.
    """

    text: str | None
    ended: bool
    fits: bool


def _generate(
    model: Any,
    tokenizer: Any,
    batch: Mapping[str, torch.Tensor],
    max_new_tokens: int,
    options: Mapping[str, Any],
    limit: tuple[int | None, bool] = (None, False),
    until: Sequence[str] = (),
) -> list[_Answer]:
    """Answers to a batch, their text None where logits were not finite.

    `limit` is the LLM's positions, and whether that is a hard limit (`layalign.data.lengths`). A text of `until` ends
    an answer too, and stays in it; without beams, nothing is generated after it.
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
    if until and arguments.get("num_beams", 1) == 1:
        stop = StopStrings(tokenizer, until, batch["input_ids"].shape[1])
        arguments["stopping_criteria"] = StoppingCriteriaList([stop, *arguments.get("stopping_criteria", ())])
    asked = arguments.get("eos_token_id")
    stops = {*ends, *(asked if isinstance(asked, list | tuple) else [asked])}
    generate = model.generate
    if hasattr(model, "generation_config") and not isinstance(model, SourceGenerationMixin):  # ours checks itself
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
        # After the first end there is only padding, which may be an ordinary token.
        end = next((i for i, token in enumerate(row) if token in ends), len(row))
        text = tokenizer.decode(row[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ended = len(row) < max_new_tokens or not stops.isdisjoint(row) or any(stop in text for stop in until)
        answers.append(_Answer(text, ended, most is None or length + end <= most + 1))
    return answers


def device_of(model: Any) -> torch.device:
    """Where a module's first parameter is; the CPU for anything else."""
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
        "use_prompt",
        "mask_encoder_padding",
        "llm_bos_token_id",
    )
    config, generation = getattr(model, "config", None), getattr(model, "generation_config", None)
    values = with_old_names({key: getattr(config, key, None) for key in keys})
    if generation is not None:
        values.update(generation.to_diff_dict())
        values.pop("transformers_version", None)
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]
