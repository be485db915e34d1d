"""An LLM alone, asked with examples in its prompt: what all prompts of a language begin with is read once.

Token for token what :func:`layalign.evaluation.answering.llm_alone` and
:func:`layalign.evaluation.likelihood.target_log_probs` compute, in a third of the time where three examples stand
before every question.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from layalign._versions import cache_name, cache_of
from layalign.data import Example
from layalign.evaluation.answering import LlmAnswers, eos_ids, pad_id
from layalign.experiments.demo.asking import Answer
from layalign.packing import real_positions

States = list[tuple[Tensor, Tensor]]  # keys and values (B, G, T, d) of every layer
_ROWS = 24  # questions in a batch: half a gigabyte of keys and values where a script is cut into bytes


@torch.no_grad()
def few_shot_answers(
    alone: LlmAnswers, questions: Mapping[str, Sequence[Example]], advance: Callable[[int], None] = lambda count: None
) -> dict[str, list[Answer]]:
    """Greedy answers to questions, and how likely their targets are.

    Args:
        alone: what `llm_alone` returns, with examples; its LLM keeps its keys and values in a cache that grows.
        questions: by language.
        advance: called with the number of questions that were answered.

    Returns:
        By language an answer to each question.
    """
    prompts = {language: _prompts(alone, asked) for language, asked in questions.items()}
    found: dict[str, list[Answer]] = {}
    group: list[str] = []
    languages = sorted(prompts, key=lambda language: max(map(len, prompts[language])))  # of similar length together
    for place, language in enumerate(languages):
        group.append(language)
        last = place + 1 == len(languages)
        if last or sum(len(prompts[name]) for name in [*group, languages[place + 1]]) > _ROWS:
            answers = _group(alone, [prompts[name] for name in group], [e for name in group for e in questions[name]])
            for name in group:
                found[name] = [next(answers) for _ in questions[name]]
                advance(len(found[name]))
            group = []
    return {language: found[language] for language in questions}


def _prompts(alone: LlmAnswers, questions: Sequence[Example]) -> list[list[int]]:
    """Token ids up to where each answer begins."""
    batch = alone.collator.contexts(questions)
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def _group(alone: LlmAnswers, prompts: Sequence[list[list[int]]], questions: Sequence[Example]) -> Any:
    """An iterator over the answers to some languages' questions, computed together."""
    starts = [_common_start([row[:-1] for row in rows]) for rows in prompts]
    states = _side_by_side([_read(alone.llm, ids) for ids in starts], [len(rows) for rows in prompts])
    width = max(map(len, starts))
    before = [
        [0] * (width - len(ids)) + [1] * len(ids) for ids, rows in zip(starts, prompts, strict=True) for _ in rows
    ]
    rests = [row[len(ids) :] for ids, rows in zip(starts, prompts, strict=True) for row in rows]
    longest = max(map(len, rests))
    ids = torch.tensor([[pad_id(alone.collator.tokenizer)] * (longest - len(row)) + row for row in rests])
    mask = torch.tensor(
        [[*start, *([0] * (longest - len(row))), *([1] * len(row))] for start, row in zip(before, rests, strict=True)]
    )
    logits, states = _step(alone.llm, states, ids, mask)
    texts = _write(alone, states, logits[:, -1], mask)
    targets = [alone.collator.continuations(question, [question.target])[0] for question in questions]
    likely = _log_probs(alone, states, logits[:, -1], mask, targets)
    return iter([Answer(text, *pair) for text, pair in zip(texts, likely, strict=True)])


def _common_start(rows: Sequence[list[int]]) -> list[int]:
    """The tokens that all rows begin with."""
    columns = zip(*rows, strict=False)
    return [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns)]


def _read(llm: Any, ids: list[int]) -> States:
    """The keys and values of the tokens that all prompts of a language begin with; none where there are none."""
    if not ids:
        return []
    return _step(llm, [], torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))[1]


def _side_by_side(read: Sequence[States], counts: Sequence[int]) -> States:
    """The states of several languages, each as often as it has questions, in one batch, padded on the left."""
    widths = [states[0][0].shape[2] if states else 0 for states in read]
    longest = max(widths)
    if not longest:
        return []
    like = next(states for states in read if states)
    joined = []
    for layer, shapes in enumerate(like):
        pair = []
        for kind, shape in enumerate(shapes):
            rows = []
            for states, width, count in zip(read, widths, counts, strict=True):
                own = states[layer][kind] if states else shape[:, :, :0]
                rows.append(torch.nn.functional.pad(own, (0, 0, longest - width, 0)).expand(count, -1, -1, -1))
            pair.append(torch.cat(rows))
        joined.append((pair[0], pair[1]))
    return joined


def _step(llm: Any, states: States, ids: Tensor, mask: Tensor, keep: int = 1) -> tuple[Tensor, States]:
    """(logits of the last ``keep`` positions, states with those of ``ids``); the given states stay as they are.

    Args:
        ids: (B, R), the last R positions of ``mask``.
        mask: (B, T), 1 where a position is real.
    """
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(states):
        cache.update(keys, values, layer)
    output = llm(
        input_ids=ids,
        attention_mask=mask,
        position_ids=real_positions(mask)[:, -ids.shape[1] :],
        use_cache=True,
        logits_to_keep=keep,
        **{cache_name(llm.forward): cache},
    )
    return output.logits, [(layer.keys, layer.values) for layer in cache_of(output).layers]


def _write(alone: LlmAnswers, states: States, logits: Tensor, mask: Tensor) -> list[str]:
    """Greedy answers up to the answer's end: a line break, or an end-of-sequence token."""
    tokenizer, end = alone.collator.tokenizer, alone.collator.end
    ends = set(eos_ids(alone.llm, tokenizer))
    written: list[list[int]] = [[] for _ in mask]
    texts: list[str] = [""] * len(written)
    open_rows = set(range(len(written)))
    for step in range(alone.max_new_tokens):
        token = logits.argmax(dim=-1)
        for row in sorted(open_rows):
            if int(token[row]) in ends:
                open_rows.discard(row)
                continue
            written[row].append(int(token[row]))
            text = tokenizer.decode(written[row], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            texts[row] = text.split(end)[0].strip() if end else text
            if end and end in text:
                open_rows.discard(row)
        if not open_rows or step + 1 == alone.max_new_tokens:
            break
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        wide, states = _step(alone.llm, states, token[:, None], mask)
        logits = wide[:, -1]
    return texts


def _log_probs(
    alone: LlmAnswers, states: States, logits: Tensor, mask: Tensor, targets: Sequence[list[int]]
) -> list[tuple[float, int]]:
    """(sum of the log-probabilities, number) of each target's tokens."""
    width = max(map(len, targets))
    pad = pad_id(alone.collator.tokenizer)
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in targets])
    real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in targets])
    scored = logits[:, None]
    if width > 1:
        behind = torch.cat([mask, real[:, :-1]], dim=1)
        scored = torch.cat([scored, _step(alone.llm, states, ids[:, :-1], behind, width - 1)[0]], dim=1)
    values = scored.float().log_softmax(dim=-1).gather(-1, ids[..., None])[..., 0] * real
    return list(zip(values.double().sum(dim=1).tolist(), real.sum(dim=1).tolist(), strict=True))
