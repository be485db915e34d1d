"""Measures of translation: their values, and seeded bootstrap intervals over sentences.

| measure | what | unit |
|---|---|---|
| `chrf`, `bleu` | sacrebleu's corpus scores of generated translations | points, 0..100 |
| `nats` | minus the log-probability of the reference given its source, its end included | nats a token |
| `nats-other-source` | the same given the source of another sentence: the next one of its language | nats a token |
| `right-one-of-N` | how often, of N references, the right one gains most by its source (see below) | percent |

What a reference gains by a source is its log-probability given this source, minus the log-sum-exp of those given each
of the N sources (`layalign.evaluation.likelihood.right_ones`).

Each sentence has a row of statistics, and the value for any sentences comes from the sum of their rows: counts for chrF
and BLEU; (nats, tokens); (right or not, 1). A bootstrap draws rows. Where all languages have the same sentences (equal
ids), a drawn sentence brings its translations in all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layalign.evaluation.intervals import interval_of, is_parallel, macro_interval
from layalign.evaluation.levels import GROUPINGS, by_level
from layalign.evaluation.metrics import wilson_interval
from layalign.evaluation.translation import METRICS, score_of
from layalign.utils.errors import ArgumentError, refuse

NATS, OTHER = "nats", "nats-other-source"
RESAMPLES = 1000
MAX_GROUP = 1000  # of right-one-of-N: N * N texts are scored for N sentences


def group_size(measure: str) -> int | None:
    """N of `right-one-of-N`; None for other measures."""
    found = re.fullmatch(r"right-one-of-([1-9]\d{0,3})", measure)
    return int(found[1]) if found and 2 <= int(found[1]) <= MAX_GROUP else None


def check_measures(measures: Any) -> tuple[str, ...]:
    """The measures asked for, each once; None is chrF and BLEU.

    Raises:
        ArgumentError: one is not known.
    """
    if measures is None:
        return METRICS
    if isinstance(measures, str) or not isinstance(measures, Sequence) or not measures:
        refuse("measures", "a list of measures", measures)
    for name in measures:
        if not isinstance(name, str) or (name not in (*METRICS, NATS, OTHER) and group_size(name) is None):
            refuse(
                "measures", f"some of {', '.join(METRICS)}, {NATS}, {OTHER}, right-one-of-N (N 2..{MAX_GROUP})", name
            )
    return tuple(dict.fromkeys(measures))


def less_is_better(measure: str) -> bool:
    """Whether a lower value is the better one."""
    return measure == NATS


def value_of(measure: str, sums: Any) -> float:
    """The measure of sentences whose statistics (k,) were summed."""
    if measure in METRICS:
        return score_of(measure, sums)
    return float(sums[0] / sums[1]) * (1.0 if measure in (NATS, OTHER) else 100.0)


@dataclass(frozen=True)
class MeasureScore:
    """A measure of one language, or the mean of several languages' values, with its 95% interval.

    Attributes:
        value, low, high: in the measure's unit.
        count: sentences, all languages together.
    """

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class MeasureScores:
    """One measure of a run.

    Attributes:
        languages: by English name, in the order of the data.
        average: mean of the languages' values.
        levels: means by grouping and resource level (`layalign.evaluation.levels`).
    """

    languages: dict[str, MeasureScore]
    average: MeasureScore
    levels: dict[str, dict[str, MeasureScore]]


class Sentences:
    """The sentences' statistics of one measure, by language.

    Args:
        measure: its name.
        statistics: by English name an array (n, k), a row per sentence.
        ids: by English name the sentences' ids.
    """

    def __init__(self, measure: str, statistics: Mapping[str, Any], ids: Mapping[str, Sequence[str]]) -> None:
        self.measure, self.names = measure, list(statistics)
        self.statistics = {name: np.asarray(rows, dtype=np.float64) for name, rows in statistics.items()}
        self.parallel = is_parallel([ids[name] for name in self.names])

    def value(self, names: Sequence[str]) -> float:
        """Mean of some languages' values."""
        return float(np.mean([value_of(self.measure, self.statistics[name].sum(axis=0)) for name in names]))

    def count(self, names: Sequence[str]) -> int:
        """Number of sentences of some languages."""
        return sum(len(self.statistics[name]) for name in names)

    def resampled(self, seed: int = 0) -> dict[str, Any]:
        """By language the values (RESAMPLES,) of sentences drawn with replacement; equal sizes and seeds draw alike."""
        generator = np.random.default_rng(seed)
        found = {}
        for name, rows in self.statistics.items():
            if self.parallel:  # the same draws for all
                generator = np.random.default_rng(seed)
            times = generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=RESAMPLES)
            found[name] = np.array([value_of(self.measure, sums) for sums in times @ rows])
        return found

    def scores(self, task: str) -> MeasureScores:
        """Values and intervals: by language, of their mean, and by resource level."""
        drawn = self.resampled()

        def score(names: Sequence[str], interval: Callable[[Sequence[str]], tuple[float, float]]) -> MeasureScore:
            return MeasureScore(self.value(names), *interval(names), self.count(names))

        def percentiles(names: Sequence[str]) -> tuple[float, float]:
            return interval_of(np.mean([drawn[name] for name in names], axis=0))

        def wilson(names: Sequence[str]) -> tuple[float, float]:
            rows = self.statistics[names[0]]
            low, high = wilson_interval(int(rows[:, 0].sum()), len(rows))
            return 100 * low, 100 * high

        def of_answers(names: Sequence[str]) -> tuple[float, float]:
            rows = [self.statistics[name][:, 0].astype(int).tolist() for name in names]
            found = macro_interval(rows, self.parallel)
            return found.low, found.high

        right = group_size(self.measure) is not None  # accuracies have the intervals of accuracies
        several = of_answers if right else percentiles
        levels = {grouping: by_level(self.names, task, grouping) for grouping in GROUPINGS}
        return MeasureScores(
            {name: score([name], wilson if right else percentiles) for name in self.names},
            score(self.names, several),
            {
                grouping: {level: score(names, several) for level, names in groups.items()}
                for grouping, groups in levels.items()
                if groups
            },
        )


def bootstrap_p(differences: Any) -> float:
    """Two-sided p of resampled differences (resamples,): how often they reach the other side of zero."""
    differences = np.asarray(differences)
    beyond = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2 * (1 + beyond) / (1 + len(differences)))


def require_groups(measures: Sequence[str], counts: Mapping[str, int]) -> None:
    """Every language has sentences enough for each measure.

    Raises:
        ArgumentError: one has not.
    """
    for measure in measures:
        least = group_size(measure) or (2 if measure == OTHER else 1)
        for language, count in counts.items():
            if count < least:
                raise ArgumentError(
                    f"measures: expected at least {least} {language} examples for {measure}, got {count}"
                )
