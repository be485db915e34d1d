"""Measurements on parallel text: similarity by view, contribution norms, and the attention of one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from layalign.data.examples import Example
from layalign.experiments.analysis import fusion
from layalign.experiments.analysis.projection import project
from layalign.experiments.analysis.reading import Reader, untrained
from layalign.experiments.analysis.result import AttentionMap, Projection, Similarity
from layalign.experiments.analysis.similarity import centred_cosine, linear_cka, retrieval_accuracy
from layalign.experiments.analysis.tokens import token_labels
from layalign.modeling.llm_inputs import IGNORE_INDEX

LLM_ALONE, UNTRAINED, BEFORE, AFTER = "LLM alone", "untrained", "before", "LayAlign"
ENGLISH = "English"
Data = Mapping[str, Sequence[Example]]
Read = Callable[[Sequence[Example]], Tensor]


def views(reader: Reader, before: Any, seed: int) -> Iterator[tuple[str, Read, AbstractContextManager[None]]]:
    """Each way to read sentences: (name, function that reads them, context manager to call it in)."""
    yield LLM_ALONE, lambda examples: reader.llm_alone([example.source for example in examples]), nullcontext()
    if isinstance(before, str):
        yield UNTRAINED, reader.through_encoder, untrained(reader.model, seed)
    elif before is not None:
        yield BEFORE, replace(reader, model=before).through_encoder, nullcontext()
    yield AFTER, reader.through_encoder, nullcontext()


def english_of(data: Data) -> list[Example]:
    """All distinct English sentences."""
    return [Example(text, "", ENGLISH) for text in dict.fromkeys(e.target for rows in data.values() for e in rows)]


def read_view(read: Read, data: Data, layer: int, seed: int) -> tuple[dict[str, Similarity], Projection]:
    """Similarity of every language to English in one view, and the projection of one layer."""
    english = english_of(data)
    rows = {example.source: row for row, example in enumerate(english)}
    states_of_english = read(english)
    similar, shown = {}, {}
    for language, examples in data.items():
        states = read(examples)
        others = states_of_english[[rows[example.target] for example in examples]]
        similar[language] = similarity(states, others, seed)
        shown[language] = states[:, layer]
        # The translations of the first language are enough, since most languages share them.
        shown.setdefault(ENGLISH, others[:, layer])
    shown[ENGLISH] = shown.pop(ENGLISH)  # drawn last, above the others
    return similar, project(shown, seed)


def similarity(states: Tensor, english: Tensor, seed: int) -> Similarity:
    """All metrics of every layer.

    Args:
        states, english: (N, layers + 1, D); row i of one is the translation of row i of the other.
        seed: seed of the shuffled pairing.
    """
    order = torch.randperm(len(states), generator=torch.Generator().manual_seed(seed))
    shuffled = torch.empty_like(order)
    shuffled[order] = order.roll(1)  # one cycle: no sentence meets its own translation
    found = Similarity([], [], [], [], [])
    for layer in range(states.shape[1]):
        x, y = states[:, layer].double(), english[:, layer].double()
        found.cosine.append(centred_cosine(x, y))
        found.cka.append(linear_cka(x, y))
        found.to_english.append(retrieval_accuracy(x, y))
        found.from_english.append(retrieval_accuracy(y, x))
        found.shuffled_cka.append(linear_cka(x, y[shuffled]))
    return found


def contributions(reader: Reader, data: Data) -> dict[str, list[float]] | None:
    """Mean contribution norm per language layer over the positions of the English text, by language and as "mean"."""
    if reader.model.encoder_aligner is None:
        return None
    sums, counts = {}, {}
    for language, examples in data.items():
        total, count = torch.zeros(len(reader.model.cross_attention), dtype=torch.float64), 0
        for _, batch, labelled in reader.batches(examples, targets=True):
            inside = (labelled["labels"] != IGNORE_INDEX).cpu()
            norms = fusion.contribution_norms(reader.model, batch)
            total += norms[:, inside].double().sum(dim=1)
            count += int(inside.sum())
        sums[language], counts[language] = total, count
    mean = torch.stack(list(sums.values())).sum(dim=0) / sum(counts.values())
    return {"mean": mean.tolist(), **{language: (sums[language] / counts[language]).tolist() for language in sums}}


def attention(reader: Reader, example: Example, generate: int) -> AttentionMap | None:
    """Attention from the English translation, or from an answer of up to ``generate`` tokens, to the source."""
    if reader.model.encoder_aligner is None:
        return None
    _, batch, labelled = next(iter(reader.batches([example], targets=not generate)))
    batch, answer = _generated(reader, batch, generate) if generate else (batch, labelled["labels"] != IGNORE_INDEX)
    ids = batch["input_ids"][answer].tolist()
    text = reader.llm_tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return AttentionMap(
        language=example.language,
        source=example.source,
        answer=text if generate else example.target,
        generated=bool(generate),
        rows=token_labels(reader.llm_tokenizer, ids),
        columns=token_labels(reader.encoder_tokenizer, batch["encoder_input_ids"][0].tolist()),
        weights=fusion.attention_maps(reader.model, batch)[:, answer.cpu()].float().tolist(),
    )


def _generated(reader: Reader, batch: dict[str, Tensor], most: int) -> tuple[dict[str, Tensor], Tensor]:
    """The batch extended by the model's greedy answer, and the positions of the answer, (1, T) bool."""
    end = reader.llm_tokenizer.eos_token_id
    options = {} if end is None else {"eos_token_id": end}
    ids = reader.model.generate(**batch, max_new_tokens=most, do_sample=False, num_beams=1, **options)
    answer = torch.arange(ids.shape[1], device=ids.device)[None] >= batch["input_ids"].shape[1]
    return {**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, answer
