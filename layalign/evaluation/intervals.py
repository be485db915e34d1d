"""How sure averages and differences of accuracies are: seeded bootstrap intervals and exact paired tests.

The unit is the question. In multilingual test sets the languages answer the same questions, translated, and a question
that is hard in one language tends to be hard in the others: answers to one question are drawn, or not drawn, together
(a cluster bootstrap), and their signs flip together in the test. Where the languages have questions of their own, each
language is drawn for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layalign.evaluation.metrics import wilson_interval
from layalign.utils.errors import ArgumentError

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A percentile bootstrap interval, in percent.

    Attributes:
        low, high: its ends.
        method: "questions" when all languages answer the same questions, which are drawn with all their answers;
            "languages" when each language's questions are drawn for themselves.
    """

    low: float
    high: float
    method: str


def is_parallel(ids: Sequence[Sequence[str]]) -> bool:
    """Whether all languages answer the same questions: equal lists of ids, none of them empty or there twice.

    Line numbers are ids too. Where equal numbers stand for unrelated questions, drawing them together does no harm.
    """
    first = list(ids[0])
    return len(set(first)) == len(first) and all(first) and all(list(other) == first for other in ids[1:])


def bootstrap_totals(values: Any, generator: np.random.Generator, resamples: int = RESAMPLES) -> Any:
    """Totals of resamples of integer values, drawn with replacement.

    Args:
        values: (N,) integers. What counts is how often each value is there, so a resample is one multinomial draw.

    Returns:
        (resamples,) int64.
    """
    kinds, counts = np.unique(np.asarray(values, dtype=np.int64), return_counts=True)
    return generator.multinomial(counts.sum(), counts / counts.sum(), size=resamples) @ kinds


def macro_interval(
    outcomes: Sequence[Sequence[int]],
    parallel: bool,
    *,
    differences: bool = False,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """Interval of the mean of the languages' means, in percent.

    Args:
        outcomes: L rows of integers, one per question: 0 or 1 for answers, -1, 0 or 1 for differences of two systems.
            With `parallel` all rows are of one length and in one order of questions.
        parallel: all languages answer the same questions.
        differences: the rows are differences.
        seed: of the resampling.
        resamples: how many.

    Returns:
        The interval. Where every question has the same outcome (all answers right, none different), resampling gives no
        width. There the interval is Wilson's, over the questions; for no difference, Wilson's on either side.

    Raises:
        ArgumentError: there is no outcome, or parallel rows differ in length.
    """
    if not outcomes or not all(len(row) for row in outcomes):
        raise ArgumentError("outcomes: expected at least one in every language, got none")
    rows = [np.asarray(row, dtype=np.int64) for row in outcomes]
    if parallel and len({len(row) for row in rows}) > 1:
        raise ArgumentError("outcomes: expected rows of one length for the same questions, got several lengths")
    method, generator = "questions" if parallel else "languages", np.random.default_rng(seed)
    # In parallel data one draw takes a question's answers in all languages: they are one row, of their sums.
    share = len(rows) if parallel else 1
    rows = [np.sum(rows, axis=0)] if parallel else rows
    if all(row.min() == row.max() for row in rows):
        value = float(np.mean([row[0] for row in rows])) / share
        low, high = _constant_interval(value, sum(map(len, rows)), differences)
        return Interval(100 * low, 100 * high, method)
    means = np.mean([bootstrap_totals(row, generator, resamples) / (share * len(row)) for row in rows], axis=0)
    low, high = interval_of(means)
    return Interval(100 * low, 100 * high, method)


def interval_of(values: Any) -> tuple[float, float]:
    """The percentile interval of resampled values (resamples,)."""
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _constant_interval(value: float, count: int, differences: bool) -> tuple[float, float]:
    low, high = wilson_interval(round(abs(value) * count), count)
    if differences and value == 0:
        return -high, high
    return (-high, -low) if value < 0 else (low, high)


def sign_flip_p(differences: Sequence[int]) -> float:
    """Exact two-sided p of the paired randomisation test: how often random signs give as large a total.

    Args:
        differences: per question, right answers of one system minus those of the other, over all languages. With one
            language this is McNemar's exact test.

    Returns:
        The p value; 1.0 where nothing differs.
    """
    from scipy.stats import binom

    sizes, counts = np.unique(np.abs(np.asarray(differences, dtype=np.int64)), return_counts=True)
    distribution = np.ones(1)  # of the total, from -reach to reach
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        if size:
            steps = np.zeros(2 * size * count + 1)
            steps[:: 2 * size] = binom.pmf(np.arange(count + 1), count, 0.5)
            distribution = np.convolve(distribution, steps)
    reach, total = len(distribution) // 2, abs(int(np.sum(differences)))
    return float(min(1.0, distribution[np.abs(np.arange(-reach, reach + 1)) >= total].sum()))


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of p values, in their order."""
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = highest
    return adjusted
