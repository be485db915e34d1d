"""Is one run better than another? Both answered the same questions, so the answers are compared in pairs.

Per language: McNemar's exact test on the questions that only one run got right, and the difference of the accuracies
with its paired bootstrap interval. Several languages have the same questions, translated. A pooled McNemar test takes
every answer as independent, so its p is too small there; an exact test over the questions stands beside it.

Translations are compared by each measure that both runs have: a paired bootstrap over sentences, which draws the same
ones for both.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from layalign.evaluation.intervals import holm, interval_of, is_parallel, macro_interval, sign_flip_p
from layalign.evaluation.levels import GROUPINGS, by_level
from layalign.evaluation.measures import Sentences, bootstrap_p, group_size, less_is_better
from layalign.evaluation.store import SETTINGS, prediction_path, read_settings
from layalign.evaluation.translation import METRICS, translation_scores
from layalign.utils.errors import ArgumentError, DataError, one_of, refuse, whole_number
from layalign.utils.limits import MAX_WHOLE_BYTES
from layalign.utils.reading import read_json

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class MeasurePairing:
    """A measure of two runs on the same sentences of one language, or of several.

    Attributes:
        languages: English names.
        count: sentences, all languages together.
        a, b: the runs' values; the mean of the languages' values.
        difference: b - a.
        low, high: its 95% paired bootstrap interval.
        p: of the same bootstrap, two-sided: twice the share of draws in which the difference has not its sign.
        p_holm: `p` after Holm's correction for all rows of one measure; None for the row of all languages.
    """

    languages: tuple[str, ...]
    count: int
    a: float
    b: float
    difference: float
    low: float
    high: float
    p: float
    p_holm: float | None = None


@dataclass(frozen=True, kw_only=True)
class Pairing(MeasurePairing):
    """Accuracy of two runs on the same questions, in percent and points.

    Attributes:
        only_a, only_b: the discordant counts, answers that one run alone got right.
        p: McNemar's exact test, two-sided; every answer counts for itself.
        p_questions: the exact sign-flip test over questions, which keeps the answers to one question in several
            languages together; equal to `p` for one language.
    """

    only_a: int
    only_b: int
    p_questions: float


P = TypeVar("P", bound=MeasurePairing)


@dataclass(frozen=True, kw_only=True)
class MeasurePairings(Generic[P]):
    """A measure of two runs.

    Attributes:
        languages: by English name.
        levels: by grouping and level; see `layalign.evaluation.levels`.
        pooled: all languages that both runs have.
    """

    languages: dict[str, P]
    levels: dict[str, dict[str, P]]
    pooled: P

    def rows(self, by: str, grouping: str, task: str) -> dict[str, P]:
        """The rows of a table of languages or levels; for the arguments and errors see `Comparison.table`."""
        if by not in ("language", "level"):
            raise ArgumentError(f"by: expected 'language' or 'level', got {by!r}")
        if by == "language":
            return self.languages
        one_of("grouping", grouping, GROUPINGS)
        if grouping not in self.levels:
            raise ArgumentError(f"grouping: expected one with levels for {task}, got {grouping!r}")
        return self.levels[grouping]


@dataclass(frozen=True, kw_only=True)
class _TwoRuns:
    """What `compare_runs` found.

    Attributes:
        task: of both runs.
        a, b: the folders.
        only_in_a, only_in_b: languages of one run alone; they are left out.
        settings: the settings that differ, with the value of either run.
    """

    task: str
    a: str
    b: str
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    settings: dict[str, tuple[Any, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return json.loads(json.dumps(asdict(self)))

    def _table(self, names: Sequence[str], numbers: Sequence[str]) -> Any:
        """A `rich` table without rows."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        title = escape(f"{self.task}: A {self.a}, B {self.b}")
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in names:
            table.add_column(name, no_wrap=True)
        for name in numbers:
            table.add_column(name, justify="right", no_wrap=name == "95% interval")
        return table


@dataclass(frozen=True, kw_only=True)
class Comparison(_TwoRuns, MeasurePairings[Pairing]):
    """What `compare_runs` found for right and wrong answers."""

    def table(self, by: str = "language", grouping: str = "joshi") -> Any:
        """A `rich` table: a row per language or per level, and one of all languages.

        Args:
            by: "language" or "level".
            grouping: "joshi" or "paper", of the levels.

        Raises:
            ArgumentError: neither of these, or the grouping has no levels for the task.
        """
        from rich.markup import escape

        table = self._table([by], ("A %", "B %", "B - A", "95% interval", "only A : B", "p", "Holm", "by question"))
        for name, row in self.rows(by, grouping, self.task).items():
            table.add_row(escape(name), *self._cells(row))
        table.add_section()
        table.add_row(f"all {len(self.languages)}", *self._cells(self.pooled))
        return table

    def _cells(self, row: Pairing) -> list[str]:
        only = f"{row.only_a} : {row.only_b}"
        return [*_numbers(row, 1), only, *_p_values(row.p, row.p_holm, row.p_questions)]


@dataclass(frozen=True, kw_only=True)
class MeasureComparison(_TwoRuns):
    """What `compare_runs` found for two runs that translated.

    Attributes:
        measures: by name, those that both runs have.
    """

    measures: dict[str, MeasurePairings[MeasurePairing]]

    def table(self, by: str = "language", grouping: str = "joshi") -> Any:
        """A `rich` table: for each measure a row per language or per level, and one of all languages.

        Arguments and errors as for `Comparison.table`.
        """
        from rich.markup import escape

        table = self._table(["measure", by], ("A", "B", "B - A", "95% interval", "p", "Holm"))
        for measure, found in self.measures.items():
            said = f"{measure} (less is better)" if less_is_better(measure) else measure
            for name, row in found.rows(by, grouping, self.task).items():
                table.add_row(said, escape(name), *self._cells(row))
            table.add_row(said, f"all {len(found.languages)}", *self._cells(found.pooled), end_section=True)
        return table

    def _cells(self, row: MeasurePairing) -> list[str]:
        return [*_numbers(row, 2), *_p_values(row.p, row.p_holm)]


def _numbers(row: MeasurePairing, places: int) -> list[str]:
    interval = f"{row.low:+.{places}f}, {row.high:+.{places}f}"
    return [f"{row.a:.{places}f}", f"{row.b:.{places}f}", f"{row.difference:+.{places}f}", interval]


def _p_values(*values: float | None) -> list[str]:
    return ["" if p is None else f"{p:.2g}" for p in values]


def mcnemar(only_a: int, only_b: int) -> float:
    """McNemar's exact test: the two-sided binomial p of the discordant counts; 1.0 where there are none."""
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0


def compare_runs(run_a: str | Path, run_b: str | Path, *, seed: int = 0) -> Comparison | MeasureComparison:
    """Compare two finished evaluations of the same test data.

    Args:
        run_a, run_b: output folders of `evaluate`.
        seed: of the bootstrap.

    Returns:
        A `MeasureComparison` for translations, otherwise a `Comparison`.

    Raises:
        ArgumentError: a folder holds no finished evaluation, or the runs have different tasks, questions, scoring, or
            no language or no measure in common.
        DataError: a file in a folder is damaged.
    """
    for name, folder in (("run_a", run_a), ("run_b", run_b)):
        if not isinstance(folder, str | Path):
            refuse(name, "the output folder of an evaluation", folder)
    whole_number("seed", seed, least=0)
    a, b = _Run("run_a", Path(run_a)), _Run("run_b", Path(run_b))
    if a.settings.get("task") != b.settings.get("task"):
        found = f"{a.settings.get('task')} and {b.settings.get('task')}"
        raise ArgumentError(f"run_b: expected an evaluation of the task of run_a, got {found}")
    if any(a.scoring[key] != b.scoring[key] for key in a.scoring.keys() & b.scoring.keys()):
        raise ArgumentError(f"run_b: expected answers scored as those of run_a, got {a.scoring} and {b.scoring}")
    both = [name for name in a.languages if name in b.languages]
    if not both:
        found = f"{', '.join(a.languages) or 'none'} and {', '.join(b.languages) or 'none'}"
        raise ArgumentError(f"run_b: expected a language that run_a has, got {found}")
    for name in both:
        if a.languages[name] != b.languages[name]:
            raise ArgumentError(f"run_b: expected the {name} questions of run_a, got other ones")
        if (ways := (a.scored.get(name), b.scored.get(name)))[0] != ways[1] and None not in ways:
            raise ArgumentError(f"run_b: expected {name} answers scored as those of run_a, got {ways[0]} and {ways[1]}")
    task = str(a.settings.get("task"))
    levels = {grouping: by_level(both, task, grouping) for grouping in GROUPINGS}
    keys = [key for key in {**a.settings, **b.settings} if a.settings.get(key) != b.settings.get(key)]
    common: dict[str, Any] = dict(
        task=task,
        a=str(run_a),
        b=str(run_b),
        only_in_a=tuple(name for name in a.languages if name not in b.languages),
        only_in_b=tuple(name for name in b.languages if name not in a.languages),
        settings={key: (a.settings.get(key), b.settings.get(key)) for key in keys},
    )
    if a.measures or b.measures:
        measures = [name for name in a.measures if name in b.measures]
        if not measures:
            found = f"{', '.join(a.measures) or 'none'} and {', '.join(b.measures) or 'none'}"
            raise ArgumentError(f"run_b: expected a measure that run_a has, got {found}")
        return MeasureComparison(measures=_compared(measures, a, b, both, levels, seed), **common)
    answers = {name: (a.answers(name), b.answers(name)) for name in both}
    return Comparison(**_grouped(lambda names: _pair(names, answers, seed), both, levels), **common)


def _grouped(
    pair: Callable[[Sequence[str]], P], languages: Sequence[str], levels: Mapping[str, Mapping[str, Sequence[str]]]
) -> dict[str, Any]:
    """The fields of `MeasurePairings`."""
    return {
        "languages": _family({name: pair([name]) for name in languages}),
        "levels": {
            grouping: _family({level: pair(names) for level, names in groups.items()})
            for grouping, groups in levels.items()
            if groups
        },
        "pooled": pair(languages),
    }


_Outcomes = list[tuple[str, int]]  # of one language: (id, 1 where the answer is right)


def _pair(names: Sequence[str], answers: Mapping[str, tuple[_Outcomes, _Outcomes]], seed: int) -> Pairing:
    parallel = is_parallel([[id for id, _ in answers[name][0]] for name in names])
    runs = [[[right for _, right in answers[name][run]] for name in names] for run in (0, 1)]
    means = [100 * sum(sum(row) / len(row) for row in rows) / len(rows) for rows in runs]
    rows = [[y - x for x, y in zip(*of, strict=True)] for of in zip(*runs, strict=True)]
    interval = macro_interval(rows, parallel, differences=True, seed=seed)
    only_a, only_b = (sum(row.count(sign) for row in rows) for sign in (-1, 1))
    # Questions of their own: every answer is a question.
    questions = [sum(of) for of in zip(*rows, strict=True)] if parallel else [value for row in rows for value in row]
    return Pairing(
        languages=tuple(names),
        count=sum(map(len, rows)),
        a=means[0],
        b=means[1],
        only_a=only_a,
        only_b=only_b,
        difference=means[1] - means[0],
        low=interval.low,
        high=interval.high,
        p=mcnemar(only_a, only_b),
        p_questions=sign_flip_p(questions),
    )


def _compared(
    measures: Sequence[str],
    a: _Run,
    b: _Run,
    languages: Sequence[str],
    levels: Mapping[str, Mapping[str, Sequence[str]]],
    seed: int,
) -> dict[str, MeasurePairings[MeasurePairing]]:
    """The measures of both runs, by a bootstrap that draws the same sentences for both."""
    runs = [run.sentences(measures, languages) for run in (a, b)]
    found = {}
    for measure in measures:
        ours, theirs = (run[measure] for run in runs)
        before, after = ours.resampled(seed), theirs.resampled(seed)

        def pair(names: Sequence[str]) -> MeasurePairing:
            values = ours.value(names), theirs.value(names)  # noqa: B023
            drawn = np.mean([after[name] - before[name] for name in names], axis=0)  # noqa: B023
            low, high = interval_of(drawn)
            return MeasurePairing(
                languages=tuple(names),
                count=ours.count(names),  # noqa: B023
                a=values[0],
                b=values[1],
                difference=values[1] - values[0],
                low=low,
                high=high,
                p=bootstrap_p(drawn),
            )

        found[measure] = MeasurePairings(**_grouped(pair, languages, levels))
    return found


def _family(pairings: dict[str, P]) -> dict[str, P]:
    adjusted = holm([pairing.p for pairing in pairings.values()])
    return {name: replace(pairing, p_holm=p) for (name, pairing), p in zip(pairings.items(), adjusted, strict=True)}


class _Run:
    """What an evaluation left in its folder: settings, fingerprints of the questions by language, and predictions."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        try:
            there = (folder / SETTINGS).is_file()
        except (OSError, ValueError):
            there = False
        if not there:
            refuse(name, "the output folder of an evaluation", str(folder))
        found = read_settings(folder)
        self.settings, self.languages, self.scored = found["settings"], found["languages"], found["scoring"]
        scores = folder / "scores.json"
        found = _read(scores) if scores.is_file() else {}
        found = found if isinstance(found, dict) else {}
        self.scoring = found["scoring"] if isinstance(found.get("scoring"), dict) else {}
        self.measures = list(found["measures"]) if isinstance(found.get("measures"), dict) else []

    def answers(self, language: str) -> _Outcomes:
        return self._predictions(language, _answers)

    def sentences(self, measures: Sequence[str], languages: Sequence[str]) -> dict[str, Sentences]:
        """The statistics of the sentences of some languages, by measure."""
        found: dict[str, tuple[dict[str, Any], dict[str, list[str]]]] = {name: ({}, {}) for name in measures}
        for language in languages:
            ids, rows = self._predictions(language, functools.partial(_statistics, measures=measures))
            for name, (statistics, kept) in found.items():
                statistics[language], kept[language] = rows[name], ids[: len(rows[name])]
        return {name: Sentences(name, *both) for name, both in found.items()}

    def _predictions(self, language: str, read: Callable[[list[dict[str, Any]]], T]) -> T:
        """What ``read`` makes of a language's predictions."""
        path = prediction_path(self.folder, language, ".json")
        if not path.is_file():
            raise ArgumentError(f"{self.name}: expected a finished evaluation, got none of {language} in {self.folder}")
        entries = _read(path)
        try:
            if len(entries) == self.languages[language]["count"]:
                return read(entries)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            pass
        raise DataError(f"{path}:1: not the predictions of the evaluation, expected a file that layalign wrote")


def _answers(entries: list[dict[str, Any]]) -> _Outcomes:
    if not all(isinstance(entry["correct"], bool) for entry in entries):
        raise ValueError
    return [(str(entry["id"]), int(entry["correct"])) for entry in entries]


def _statistics(entries: list[dict[str, Any]], measures: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """(ids, by measure the rows of statistics); a ValueError where predictions have not what a measure needs."""
    rows: dict[str, Any] = {}
    metrics = [name for name in measures if name in METRICS]
    if metrics:
        outputs = ["" if entry["output"] is None else entry["output"] for entry in entries]
        rows.update(translation_scores(outputs, [entry["gold"] for entry in entries], metrics)["statistics"])
    for name in (name for name in measures if name not in METRICS):
        if group_size(name) is not None:
            rights = [entry["measures"][name] for entry in entries if name in entry.get("measures", {})]
            rows[name] = [[int(right), 1] for right in rights]
            good = bool(rights) and all(isinstance(right, bool) for right in rights)
        else:
            rows[name] = [entry["measures"][name] for entry in entries]
            good = all(
                isinstance(nats, float) and isfinite(nats) and type(tokens) is int and tokens > 0
                for nats, tokens in rows[name]
            )
        if not good:
            raise ValueError
    return [str(entry["id"]) for entry in entries], rows


def _read(path: Path) -> Any:
    """A file that layalign wrote; predictions hold every text."""
    return read_json(path, where=f"{path}:1: not a file that layalign wrote", most=MAX_WHOLE_BYTES, error=DataError)
