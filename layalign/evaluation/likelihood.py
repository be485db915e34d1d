"""Log-probabilities of given texts, in nats: of the target, and of several choices after one context.

Nothing is generated. A target's log-probability is the sum over its tokens, its end included, as in training. Models
and collators come in two kinds: a `LayAlignForCausalLM` with a `LayAlignCollator`, and an LLM alone with a
`PromptCollator` (the attributes `llm` and `collator` of what `llm_alone` returns).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from math import isfinite, nan
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from layalign.data.examples import Example
from layalign.evaluation.answering import device_of, evaluation_mode
from layalign.evaluation.measures import NATS, OTHER, group_size
from layalign.evaluation.shared_start import read_start
from layalign.modeling.llm_inputs import IGNORE_INDEX, real_positions
from layalign.utils.errors import ArgumentError, NonFiniteError, refuse, shown, whole_number
from layalign.utils.versions import cache_name, cache_of

LABELS = "labels"  # measured by the scorers that choose a label by likelihood
LogProb = tuple[float, int]  # (sum of the log-probabilities of a text's tokens, number of these tokens)


def target_log_probs(model: Any, collator: Any, examples: Sequence[Example], batch_size: int = 16) -> list[LogProb]:
    """Log-probability of each example's target, given its source (and prompt).

    Args:
        model: a `LayAlignForCausalLM`, or an LLM.
        collator: made with `with_targets=True`, or a `PromptCollator`.
        examples: whose targets.
        batch_size: examples per forward pass; those of similar length go together.

    Returns:
        For each example, in the order given, the sum of its target tokens' log-probabilities (nats) and the number of
        these tokens, both with the token that ends the target. Sums are made in float64 of float32 values.

    Raises:
        ArgumentError: an argument is none of those expected, or an example is longer than the LLM's table of positions.
        NonFiniteError: logits were not finite; `rows` are the numbers of these examples, `output` has all values.
    """
    _check(model, collator, examples, batch_size)
    found: list[LogProb] = [(nan, 0)] * len(examples)
    with evaluation_mode(model), torch.no_grad():
        for numbers in _batches(examples, batch_size):
            own = [examples[i] for i in numbers]
            if getattr(collator, "shots", None):  # which are then read once
                ids = [collator.continuations(example, [example.target]) for example in own]
                rows = [value for _, _, value in _after_contexts(model, collator, own, ids)]
            else:
                rows = _targets(model, collator, own)
            for i, row in zip(numbers, rows, strict=True):
                found[i] = row
    _require_finite(examples, [value for value, _ in found], found)
    return found


def _targets(model: Any, collator: Any, examples: Sequence[Example]) -> list[LogProb]:
    """What `target_log_probs` gives for a batch, in one pass."""
    batch = _call(model, collator(examples))
    labels = batch.pop("labels", None)
    if labels is None:
        raise ArgumentError("collator: expected one with targets, this one was made with with_targets=False")
    _check_room(collator, examples, batch["attention_mask"].sum(1).tolist())
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # position t predicts token t + 1
    keep = labels.shape[1] - int((targets != IGNORE_INDEX).any(0).int().argmax())
    logits = model(**batch, logits_to_keep=keep, use_cache=False).logits  # (B, keep, V)
    return _row_sums(logits, targets[:, -keep:])


def choice_log_probs(
    model: Any, collator: Any, examples: Sequence[Example], choices: Sequence[Sequence[str]], batch_size: int = 16
) -> list[list[LogProb]]:
    """Log-probability of several texts after each example's context; the example's own target is not used.

    Source and prompt are read once per example: its choices go on with copies of the cache.

    Args:
        model, collator: as for `target_log_probs`.
        examples: the contexts.
        choices: for each example, the texts.
        batch_size: examples whose texts are scored together, one of each in a forward pass.

    Returns:
        For each example, and each of its choices in their order, what `target_log_probs` gives for a target.

    Raises:
        ArgumentError, NonFiniteError: as for `target_log_probs`.
    """
    _check(model, collator, examples, batch_size)
    if len(choices) != len(examples) or not all(_are_texts(texts) for texts in choices):
        refuse("choices", f"a list of texts for each of {len(examples)} examples", choices)
    found: list[list[LogProb]] = [[(nan, 0)] * len(texts) for texts in choices]
    with evaluation_mode(model), torch.no_grad():
        for numbers in _batches(examples, batch_size):
            ids = [collator.continuations(examples[i], choices[i]) for i in numbers]
            for row, place, value in _after_contexts(model, collator, [examples[i] for i in numbers], ids):
                found[numbers[row]][place] = value
    _require_finite(examples, [sum(value for value, _ in rows) for rows in found], found)
    return found


def _after_contexts(
    model: Any, collator: Any, examples: Sequence[Example], ids: Sequence[Sequence[list[int]]]
) -> Iterator[tuple[int, int, LogProb]]:
    """(number of the example, number of its choice, log-probability) for token ids that follow each context.

    One pass for the contexts, then one for each number of a choice. Every process makes as many passes, however few
    examples it has: the weights may be sharded over all of them. The shortest choices go together, to pad little.
    """
    contexts = _call(model, collator.contexts(examples))
    before = contexts["attention_mask"]
    lengths = before.sum(1).tolist()
    _check_room(collator, examples, [n + max(map(len, rows), default=0) for n, rows in zip(lengths, ids, strict=True)])
    name, inputs = cache_name(model.forward), contexts
    if getattr(collator, "shots", None):
        contexts, start = read_start(model, contexts)
        inputs, before = contexts, contexts["attention_mask"]
        if start is not None:
            own = {key: contexts[key][:, start.get_seq_length() :] for key in ("input_ids", "position_ids")}
            inputs = {**own, "attention_mask": before, name: start}
    output = model(**inputs, use_cache=True, logits_to_keep=1)
    cache, last = cache_of(output), output.logits  # (B, 1, V)
    orders = [np.argsort([len(each) for each in row], kind="stable").tolist() for row in ids]
    for rank in range(max(map(len, ids))):
        places = [order[rank] if rank < len(order) else None for order in orders]
        rows = [[] if place is None else row[place] for place, row in zip(places, ids, strict=True)]
        width = max(map(len, rows))
        padded = [row + [IGNORE_INDEX] * (width - len(row)) for row in rows]
        tokens = torch.tensor(padded, device=before.device)  # (B, T), padded on the right
        logits = last  # the first token follows the context
        if width > 1:
            mask = torch.cat([before, (tokens[:, :-1] != IGNORE_INDEX).to(before.dtype)], dim=1)
            inputs = {"input_ids": tokens[:, :-1].clamp(min=0), "attention_mask": mask, name: copy.deepcopy(cache)}
            if "position_ids" in contexts:
                inputs["position_ids"] = real_positions(mask)[:, before.shape[1] :]
            logits = torch.cat([last, model(**inputs, use_cache=True).logits], dim=1)
        for number, (place, value) in enumerate(zip(places, _row_sums(logits, tokens), strict=True)):
            if place is not None:
                yield number, place, value


def _row_sums(logits: Tensor, targets: Tensor) -> list[LogProb]:
    """The log-probabilities of targets (B, T), -100 where there is none, under logits (B, T, V), summed by row."""
    targets = targets.to(logits.device)
    wanted = targets != IGNORE_INDEX
    chosen = logits[wanted]
    wide = chosen if chosen.dtype == torch.float64 else chosen.float()
    values = -F.cross_entropy(wide, targets[wanted], reduction="none").cpu().double()
    owners = wanted.nonzero()[:, 0].cpu()
    sums = torch.zeros(len(targets), dtype=torch.float64).index_add(0, owners, values)
    return list(zip(sums.tolist(), wanted.sum(1).tolist(), strict=True))


class Likelihoods:
    """What an evaluation measures of a language by likelihood: "nats", "nats-other-source", "right-one-of-N", "labels".

    Args:
        model, collator, batch_size: as for `target_log_probs`.
    """

    def __init__(self, model: Any, collator: Any, batch_size: int) -> None:
        self.model, self.collator, self.batch_size = model, collator, batch_size

    def units(self, measure: str, examples: Sequence[Example], done: Collection[int]) -> list[list[int]]:
        """Numbers of examples that are measured together; those that are done are left out.

        For right-one-of-N they are N examples in a row, and what is left at the end is not measured.
        """
        size = group_size(measure)
        if size is None:
            rest = [i for i in range(len(examples)) if i not in done]
            return [[rest[i] for i in own] for own in _batches([examples[i] for i in rest], self.batch_size)]
        groups = [list(range(start, start + size)) for start in range(0, len(examples) - size + 1, size)]
        return [group for group in groups if not all(i in done for i in group)]

    def __call__(self, measure: str, examples: Sequence[Example], numbers: Sequence[int]) -> dict[int, list[float]]:
        """The numbers of some examples of a language: NaN or infinity where logits were not finite.

        Returns:
            For each example's number: "nats" and "nats-other-source" the target's log-probability and number of tokens;
            "right-one-of-N" the log-probabilities of all N targets; "labels" those of all its labels, then their
            numbers of tokens.
        """
        own = [examples[i] for i in numbers]
        if measure in (NATS, OTHER):
            if measure == OTHER:
                own = [_with_other_source(examples, i) for i in numbers]
            pairs = _values(target_log_probs, self.model, self.collator, own, self.batch_size)
            return {i: [value, count] for i, (value, count) in zip(numbers, pairs, strict=True)}
        texts = [[e.target for e in own]] * len(own) if group_size(measure) else [list(e.choices) for e in own]
        rows = _values(choice_log_probs, self.model, self.collator, own, texts, self.batch_size)
        counts = measure == LABELS
        return {
            i: [value for value, _ in row] + ([count for _, count in row] if counts else [])
            for i, row in zip(numbers, rows, strict=True)
        }


def _values(function: Any, *arguments: Any) -> Any:
    """What the function returns, with the values that are not finite among them."""
    try:
        return function(*arguments)
    except NonFiniteError as error:
        return error.output


def _with_other_source(examples: Sequence[Example], number: int) -> Example:
    """An example with the source and the prompt of the next one that has another source."""
    own = examples[number]
    others = (examples[(number + step) % len(examples)] for step in range(1, len(examples)))
    other = next((example for example in others if example.source != own.source), None)
    if other is None:
        raise ArgumentError(f"data: expected different {own.language} sources for {OTHER}, all are one")
    return replace(own, source=other.source, prompt=other.prompt)


def right_ones(scores: Sequence[Sequence[float]], targets: Sequence[str]) -> list[bool]:
    """For each of N sources, whether its own target is the one of N that gains most by it.

    What target j gains by source i is log p(j | i) minus the log-sum-exp over all N sources i' of log p(j | i'): the
    pointwise mutual information of the two, up to a constant. So a target that is likely anyway has no advantage.

    Args:
        scores: N rows (sources) of N log-probabilities (targets), in nats.
        targets: N texts. Where the best one has the words of the right one, it is right.
    """
    table = np.asarray(scores, dtype=np.float64)
    if table.shape != (len(targets), len(targets)):
        refuse("scores", f"{len(targets)} rows of {len(targets)} numbers", scores)
    best = (table - np.logaddexp.reduce(table, axis=0)).argmax(axis=1)
    return [targets[int(j)] == target for j, target in zip(best, targets, strict=True)]


def best_label(log_probs: Sequence[LogProb], labels: Sequence[str], mean: bool = False) -> str | None:
    """The label with the highest log-probability, summed over its tokens or their mean; None where two share it."""
    values = [value / count if mean else value for value, count in log_probs]
    highest = max(values)
    return labels[values.index(highest)] if values.count(highest) == 1 else None


def _call(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch as the model takes it: on its device, without position ids where it has no such argument."""
    if "position_ids" in batch and "position_ids" not in inspect.signature(model.forward).parameters:
        batch = {name: tensor for name, tensor in batch.items() if name != "position_ids"}
    device = device_of(model)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def longest_first(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in batches, the longest first: a batch that does not fit into memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _batches(examples: Sequence[Example], size: int) -> Iterator[list[int]]:
    return longest_first([len(e.source) + len(e.prompt) + len(e.target) for e in examples], size)


def _are_texts(texts: Any) -> bool:
    return isinstance(texts, Sequence) and not isinstance(texts, str) and all(isinstance(text, str) for text in texts)


def _check(model: Any, collator: Any, examples: Any, batch_size: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise ArgumentError(f"model: expected a LayAlign model or a causal language model, got {type(model).__name__}")
    if not callable(collator) or not hasattr(collator, "contexts") or not hasattr(collator, "continuations"):
        raise ArgumentError(f"collator: expected a LayAlignCollator or a PromptCollator, got {type(collator).__name__}")
    if not isinstance(examples, Sequence) or not all(isinstance(example, Example) for example in examples):
        refuse("examples", "a list of Example", examples)
    whole_number("batch_size", batch_size, least=1)


def _check_room(collator: Any, examples: Sequence[Example], lengths: Sequence[int]) -> None:
    most = collator.llm_positions if collator.llm_positions_end else None
    for example, length in zip(examples, lengths, strict=True):
        if most is not None and length > most:
            raise ArgumentError(
                f"examples: the {example.language} example {example.id!r} takes {length} tokens of the LLM, expected "
                f"at most its {most} positions"
            )


def _require_finite(examples: Sequence[Example], values: Sequence[float], output: Any) -> None:
    rows = [i for i, value in enumerate(values) if not isfinite(value)]
    if rows:
        first, others = examples[rows[0]], f" and {len(rows) - 1} more" if rows[1:] else ""
        raise NonFiniteError(
            f"model: expected finite logits, got NaN or infinity for the {first.language} example {first.id!r} "
            f"({shown(first.source)}){others}",
            rows,
            output,
        )
