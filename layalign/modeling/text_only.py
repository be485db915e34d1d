"""Logits processors and stopping criteria see text only: no source slots, no boundary, no padding.

In ``input_ids`` these positions hold a filler (pad, EOS, ...), which a repetition penalty or a stop text would take for
words. Rows of a batch have different numbers of them, and no id is neutral for every processor. So rows whose texts are
equally long form a group, and each group has its own processors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers import PrefixConstrainedLogitsProcessor as PrefixConstrained
from transformers.generation import logits_process, stopping_criteria

from layalign.modeling.llm_inputs import LLMInputs
from layalign.utils.errors import ArgumentError

# transformers' own that read the scores, the width of input_ids (which max_length counts) or the newest token only.
_TAKE_ALL_IDS = {
    getattr(module, name)
    for module, names in (
        (logits_process, ("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "TopHLogitsWarper",
                          "MinPLogitsWarper", "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper",
                          "InfNanRemoveLogitsProcessor", "LogitNormalization", "SuppressTokensLogitsProcessor")),
        (stopping_criteria, ("MaxLengthCriteria", "MaxTimeCriteria", "EosTokenCriteria")),
    )
    for name in names
    if hasattr(module, name)
}  # fmt: skip


def takes_all_ids(called: Any) -> bool:
    """Whether a processor or criterion gets the LLM's input ids as they are."""
    return type(called) in _TAKE_ALL_IDS or getattr(called, "packed_ids", False) is True


@dataclass(frozen=True)
class Group:
    """Samples of a batch whose texts are equally long.

    Attributes:
        samples: n row numbers of the unexpanded batch.
        places: (n, V) int64, the positions of each sample's text in its input ids.
    """

    samples: list[int]
    places: Tensor

    def rows(self, times: int) -> list[int]:
        """The group's rows in a batch where every sample has ``times`` consecutive rows."""
        return [sample * times + copy for sample in self.samples for copy in range(times)]


class Text:
    """Which of a batch's ids are text. Computed only when a processor, criterion or streamer asks.

    Args:
        tokens: the LLM's input ids and their mask, (B, T) each.
        lengths: (B, 1), the numbers of real source tokens; None if there are no slots in these ids.
    """

    def __init__(self, tokens: LLMInputs, lengths: Tensor | None) -> None:
        self.tokens, self.lengths = tokens, lengths
        self.input_ids = tokens.input_ids

    @cached_property
    def groups(self) -> list[Group]:
        """The samples, by the length of their text."""
        is_text = self.tokens.attention_mask.bool()
        if self.lengths is not None:
            is_text = is_text & ~self.tokens.slots(self.lengths)[1]
        by_length: dict[int, list[int]] = {}
        for sample, length in enumerate(is_text.sum(1).tolist()):
            by_length.setdefault(length, []).append(sample)
        return [
            Group(samples, is_text[samples].nonzero()[:, 1].view(len(samples), length))
            for length, samples in by_length.items()
        ]

    def views(self, input_ids: Tensor) -> list[tuple[list[int], Tensor]]:
        """(rows, their text) for every group.

        Args:
            input_ids: (B * n, T + new), as ``generate`` has expanded and continued them.
        """
        times, width = len(input_ids) // len(self.input_ids), self.input_ids.shape[1]
        views = []
        for group in self.groups:
            rows = group.rows(times)
            own = input_ids[rows]
            places = group.places.repeat_interleave(times, 0).to(own.device)
            views.append((rows, torch.cat([own.gather(1, places), own[:, width:]], dim=1)))
        return views


class _Given(list[Any]):
    """A list that ``generate`` was given. It brings the batch's text to the hook that adds transformers' own items."""

    text: Text


class GivenProcessors(_Given, LogitsProcessorList):
    """The caller's logits processors."""


class GivenCriteria(_Given, StoppingCriteriaList):
    """The caller's stopping criteria."""


def with_text(kind: type[_Given], text: Text, items: Sequence[Any] | None) -> Any:
    """The caller's ``items``, with the text that they will see."""
    given = kind(items or ())
    given.text = text
    return given


class TextProcessors(LogitsProcessorList):
    """Applies every processor to the text of each group.

    Args:
        text: the batch's text.
        lists: for each group its processors, the same kinds in the same order.
    """

    def __init__(self, text: Text, lists: Sequence[Sequence[Any]]) -> None:
        super().__init__(lists[0])  # transformers looks at the length
        self.text, self.lists = text, lists

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """(B * n, T + new) ids and (B * n, vocabulary) scores -> new scores."""
        views = self.text.views(input_ids)
        for own in zip(*self.lists, strict=True):
            if takes_all_ids(own[0]):
                scores = own[0](input_ids, scores, **kwargs)
                continue
            processed = torch.empty_like(scores)
            for processor, (rows, ids) in zip(own, views, strict=True):
                part = processor(ids, scores[rows], **kwargs)
                _check("logits_processor", processor, part, processed[rows].shape)
                processed[rows] = part.to(processed.dtype)
            scores = processed
        return scores


class TextCriteria(StoppingCriteriaList):
    """Asks every criterion about the text of each group.

    Args:
        text: the batch's text.
        criteria: the caller's and transformers'.
    """

    def __init__(self, text: Text, criteria: Sequence[Any]) -> None:
        super().__init__(criteria)  # transformers looks for an end token and the longest answer in them
        self.text = text
        self.lists = [criteria, *(copies(criteria) for _ in text.groups[1:])]

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """(B * n, T + new) ids -> (B * n,) bool, whether each row ends."""
        views, size = self.text.views(input_ids), len(self.text.input_ids)
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for own in zip(*self.lists, strict=True):
            if takes_all_ids(own[0]):
                done = done | own[0](input_ids, scores, **kwargs)
                continue
            for group, criterion, (rows, ids) in zip(self.text.groups, own, views, strict=True):
                steps = None if scores is None else tuple(step[group.rows(len(step) // size)] for step in scores)
                part = torch.as_tensor(criterion(ids, steps, **kwargs), dtype=torch.bool, device=done.device)
                if part.dim():
                    _check("stopping_criteria", criterion, part, done[rows].shape)
                done[rows] |= part
        return done


def copies(items: Sequence[Any]) -> list[Any]:
    """Copies for another group: what an item assigns to itself between two steps belongs to one group's rows."""
    return [copy.copy(item) for item in items]


def _check(name: str, called: Any, result: Any, shape: torch.Size) -> None:
    if not isinstance(result, Tensor) or result.shape != shape:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ArgumentError(
            f"{name}: expected {tuple(shape)} from {type(called).__name__}, got {got}; it is called with the rows "
            "whose texts are equally long, or with all of input_ids if it has packed_ids = True"
        )


def text_processors(
    given: GivenProcessors, build: Callable[..., Sequence[Any]], generation_config: Any, allowed: Any, others: Any
) -> LogitsProcessorList:
    """transformers' processors and the caller's, built for each group as for a batch of its text alone.

    Args:
        given: the caller's processors.
        build: transformers' ``_get_logits_processor``.
        generation_config: of this call; its lengths count positions of ``input_ids``.
        allowed: the caller's ``prefix_allowed_tokens_fn``, which gets row numbers of the whole batch.
        others: further arguments of ``build``.
    """
    own, text = LogitsProcessorList(given), given.text
    others = {**others, "encoder_input_ids": text.input_ids}
    for_batch = build(generation_config, logits_processor=own, prefix_allowed_tokens_fn=allowed, **others)
    if all(map(takes_all_ids, for_batch)):
        return LogitsProcessorList(for_batch)
    times = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    # How many rows share one number for the caller's function differs between versions of transformers.
    same = next((getattr(each, "_num_beams", 1) for each in for_batch if isinstance(each, PrefixConstrained)), 1)
    lists = []
    for number, group in enumerate(text.groups):
        length, numbers = group.places.shape[1], [row // same for row in group.rows(times)[::same]]
        config, hidden = copy.copy(generation_config), text.input_ids.shape[1] - length
        config.max_length -= hidden
        config.min_length = max((config.min_length or 0) - hidden, 0)
        changes = dict(
            input_ids_seq_length=length,
            encoder_input_ids=text.input_ids[group.samples].gather(1, group.places),
            prefix_allowed_tokens_fn=None if allowed is None else _renumbered(allowed, numbers),
            logits_processor=LogitsProcessorList(copies(own) if number else own),
            model_kwargs={},  # no mask: a group's text has no padding
        )
        lists.append(build(config, **{**others, **changes}))
    return TextProcessors(text, lists)


def _renumbered(allowed: Callable[[int, Tensor], list[int]], numbers: Sequence[int]) -> Callable[..., list[int]]:
    return lambda number, ids: allowed(numbers[number], ids)


class TextOnlyStreamer:
    """Passes the prompts' text to a streamer, and then every new token.

    Args:
        streamer: one of transformers'.
        text: the batch's text.
        filler: id that pads texts of different lengths on the left.
    """

    def __init__(self, streamer: Any, text: Text, filler: int) -> None:
        self.streamer, self.text, self.filler = streamer, text, filler
        self._prompt = True

    def put(self, value: Tensor) -> None:
        """First the LLM's input ids (B * n, T), then new tokens."""
        if self._prompt:
            self._prompt, input_ids = False, value
            views = self.text.views(input_ids)
            width = max(ids.shape[1] for _, ids in views)
            value = input_ids.new_empty(len(input_ids), width)
            for rows, ids in views:
                value[rows] = F.pad(ids, (width - ids.shape[1], 0), value=self.filler)
        self.streamer.put(value)

    def end(self) -> None:
        """Called after the last token."""
        self.streamer.end()
