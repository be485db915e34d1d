"""Translations scored by sacrebleu: chrF and BLEU, with each sentence's statistics.

The score of a set of sentences is computed from the sums of their statistics, so that a bootstrap over sentences draws
statistics and scores no sentence again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from layalign.utils.errors import ArgumentError, BackendError, one_of, refuse

METRICS = ("chrf", "bleu")


def translation_scores(
    outputs: Sequence[str], references: Sequence[str], metrics: Sequence[str] = METRICS
) -> dict[str, Any]:
    """Corpus scores of translations, as sacrebleu's `corpus_chrf` and `corpus_bleu` give them.

    Args:
        outputs: N translations.
        references: N texts that they are compared with, one each.
        metrics: "chrf" (chrF2: up to 6 characters in a row, beta 2), "bleu" (4-grams of words, tokeniser 13a), or both.

    Returns:
        Under each metric's name its score, 0..100. Under "statistics" by metric an array (N, k) of int64: `score_of`
        makes the score of any sentences from the sum of their rows. Under "signatures" by metric sacrebleu's signature.

    Raises:
        ArgumentError: the two lists differ in length, are empty, or hold something else than text.
        BackendError: sacrebleu is not installed.
    """
    for name, texts in (("outputs", outputs), ("references", references)):
        if isinstance(texts, str) or not isinstance(texts, Sequence) or not all(isinstance(t, str) for t in texts):
            refuse(name, "a list of texts", texts)
    if not outputs or len(outputs) != len(references):
        raise ArgumentError(f"outputs: expected one for each of the references, got {len(outputs)}, {len(references)}")
    found: dict[str, Any] = {"statistics": {}, "signatures": {}}
    for name in metrics:
        metric = metric_of(name)
        rows = metric._extract_corpus_statistics(list(outputs), [list(references)])
        found["statistics"][name] = np.asarray(rows, dtype=np.int64)
        found[name] = score_of(name, found["statistics"][name].sum(axis=0))
        found["signatures"][name] = str(metric.get_signature())
    return found


def score_of(metric: str, statistics: Any) -> float:
    """The score, 0..100, of sentences whose statistics (k,) were summed."""
    return float(metric_of(metric)._compute_score_from_stats([int(value) for value in statistics]).score)


@lru_cache
def metric_of(name: str) -> Any:
    """sacrebleu's metric "chrf" or "bleu".

    Raises:
        ArgumentError: it is neither.
        BackendError: sacrebleu is not installed.
    """
    one_of("metrics", name, METRICS)
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise BackendError("sacrebleu: not installed; pip install 'layalign[translation]'") from error
    return CHRF() if name == "chrf" else BLEU()
