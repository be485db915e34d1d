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
from typing import Any, TypeVar

import numpy as np

from layalign.evaluation.intervals import holm, is_parallel, macro_interval, sign_flip_p
from layalign.evaluation.levels import GROUPINGS, by_level
from layalign.evaluation.measures import Sentences, bootstrap_p, group_size, interval_of, less_is_better
from layalign.evaluation.store import SETTINGS, prediction_path
from layalign.evaluation.translation import METRICS, translation_scores
from layalign.utils.errors import ArgumentError, DataError, refuse, whole_number
from layalign.utils.limits import MAX_WHOLE_BYTES
from layalign.utils.reading import read_json

T = TypeVar("T")


@dataclass(frozen=True)
class Pairing:
    """Two runs on the same questions of one language, or of several.

    Attributes:
        languages: English names.
        count: answers, all languages together.
        a, b: accuracies of the runs in percent; the mean of the languages' accuracies.
        only_a, only_b: the discordant counts, answers that one run alone got right.
        difference: b - a in points.
        low, high: its 95% paired bootstrap interval.
        p: McNemar's exact test, two-sided; every answer counts for itself.
        p_holm: `p` after Holm's correction for all rows of one table; None for the row of all languages.
        p_questions: the exact sign-flip test over questions, which keeps the answers to one question in several
            languages together; equal to `p` for one language.
    """

    languages: tuple[str, ...]
    count: int
    a: float
    b: float
    only_a: int
    only_b: int
    difference: float
    low: float
    high: float
    p: float
    p_holm: float | None
    p_questions: float


@dataclass(frozen=True)
class Comparison:
    """What `compare_runs` found.

    Attributes:
        task: of both runs.
        a, b: the folders.
        languages: by English name.
        levels: by grouping and level; see `layalign.evaluation.levels`.
        pooled: all languages that both runs have.
        only_in_a, only_in_b: languages of one run alone; they are left out.
        settings: the settings that differ, with the value of either run.
    """

    task: str
    a: str
    b: str
    languages: dict[str, Pairing]
    levels: dict[str, dict[str, Pairing]]
    pooled: Pairing
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    settings: dict[str, tuple[Any, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return json.loads(json.dumps(asdict(self)))

    def table(self, by: str = "language", grouping: str = "joshi") -> Any:
        """A `rich` table: a row per language or per level, and one of all languages.

        Args:
            by: "language" or "level".
            grouping: "joshi" or "paper", of the levels.

        Raises:
            ArgumentError: neither of these, or the grouping has no levels for the task.
        """
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        title = escape(f"{self.task}: A {self.a}, B {self.b}")
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column(by, no_wrap=True)
        for name in ("A %", "B %", "B - A", "95% interval", "only A : B", "p", "Holm", "by question"):
            table.add_column(name, justify="right", no_wrap=name == "95% interval")
        for name, pairing in self.rows(by, grouping).items():
            table.add_row(escape(name), *_cells(pairing))
        table.add_section()
        table.add_row(f"all {len(self.languages)}", *_cells(self.pooled))
        return table

    def rows(self, by: str = "language", grouping: str = "joshi") -> dict[str, Pairing]:
        """The pairings of the table's rows; arguments and errors as for `table`."""
        return self.languages if _by_language(by, grouping, self.levels, self.task) else self.levels[grouping]


def _by_language(by: str, grouping: str, levels: Mapping[str, Any], task: str) -> bool:
    """Whether a table's rows are languages; otherwise the grouping has levels."""
    if by not in ("language", "level"):
        raise ArgumentError(f"by: expected 'language' or 'level', got {by!r}")
    if by == "level" and grouping not in GROUPINGS:
        raise ArgumentError(f"grouping: expected one of {', '.join(GROUPINGS)}, got {grouping!r}")
    if by == "level" and grouping not in levels:
        raise ArgumentError(f"grouping: expected one with levels for {task}, got {grouping!r}")
    return by == "language"


def _cells(pairing: Pairing) -> list[str]:
    numbers = [f"{pairing.a:.1f}", f"{pairing.b:.1f}", f"{pairing.difference:+.1f}"]
    numbers += [f"{pairing.low:+.1f}, {pairing.high:+.1f}", f"{pairing.only_a} : {pairing.only_b}"]
    return numbers + ["" if p is None else f"{p:.2g}" for p in (pairing.p, pairing.p_holm, pairing.p_questions)]


@dataclass(frozen=True)
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
    p_holm: float | None


@dataclass(frozen=True)
class MeasurePairings:
    """A measure of two runs: by language, by grouping and level, and of all languages that both have."""

    languages: dict[str, MeasurePairing]
    levels: dict[str, dict[str, MeasurePairing]]
    pooled: MeasurePairing


@dataclass(frozen=True)
class MeasureComparison:
    """What `compare_runs` found for two runs that translated.

    Attributes:
        task, a, b, only_in_a, only_in_b, settings: as those of `Comparison`.
        measures: by name, those that both runs have.
    """

    task: str
    a: str
    b: str
    measures: dict[str, MeasurePairings]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    settings: dict[str, tuple[Any, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return json.loads(json.dumps(asdict(self)))

    def table(self, by: str = "language", grouping: str = "joshi") -> Any:
        """A `rich` table: for each measure a row per language or per level, and one of all languages.

        Arguments and errors as for `Comparison.table`.
        """
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        title = escape(f"{self.task}: A {self.a}, B {self.b}")
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in ("measure", by):
            table.add_column(name, no_wrap=True)
        for name in ("A", "B", "B - A", "95% interval", "p", "Holm"):
            table.add_column(name, justify="right", no_wrap=name == "95% interval")
        for measure, found in self.measures.items():
            languages = _by_language(by, grouping, found.levels, self.task)
            said = f"{measure} (less is better)" if less_is_better(measure) else measure
            for name, row in (found.languages if languages else found.levels[grouping]).items():
                table.add_row(said, escape(name), *_measure_cells(row))
            table.add_row(said, f"all {len(found.languages)}", *_measure_cells(found.pooled), end_section=True)
        return table


def _measure_cells(row: MeasurePairing) -> list[str]:
    numbers = [f"{row.a:.2f}", f"{row.b:.2f}", f"{row.difference:+.2f}", f"{row.low:+.2f}, {row.high:+.2f}"]
    return numbers + ["" if p is None else f"{p:.2g}" for p in (row.p, row.p_holm)]


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
    answers = {name: _Answers(a.answers(name), b.answers(name)) for name in both}
    return Comparison(
        languages=_family({name: _pair([name], answers, seed) for name in both}),
        levels={
            grouping: _family({level: _pair(names, answers, seed) for level, names in groups.items()})
            for grouping, groups in levels.items()
            if groups
        },
        pooled=_pair(both, answers, seed),
        **common,
    )


class _Answers:
    """The answers of two runs to the questions of one language: ids, and 1 where an answer is right."""

    def __init__(self, a: list[tuple[str, int]], b: list[tuple[str, int]]) -> None:
        self.ids = [id for id, _ in a]
        self.a, self.b = [right for _, right in a], [right for _, right in b]
        self.differences = [y - x for x, y in zip(self.a, self.b, strict=True)]


def _pair(names: Sequence[str], answers: dict[str, _Answers], seed: int) -> Pairing:
    members = [answers[name] for name in names]
    parallel = is_parallel([member.ids for member in members])
    means = [
        100 * sum(sum(row) / len(row) for row in rows) / len(rows)
        for rows in ([member.a for member in members], [member.b for member in members])
    ]
    rows = [member.differences for member in members]
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
        p_holm=None,
        p_questions=sign_flip_p(questions),
    )


def _compared(
    measures: Sequence[str],
    a: _Run,
    b: _Run,
    languages: Sequence[str],
    levels: Mapping[str, Mapping[str, Sequence[str]]],
    seed: int,
) -> dict[str, MeasurePairings]:
    """The measures of both runs, by a bootstrap that draws the same sentences for both."""
    runs = [run.sentences(measures, languages) for run in (a, b)]
    found = {}
    for measure in measures:
        ours, theirs = (run[measure] for run in runs)
        before, after = ours.resampled(seed), theirs.resampled(seed)

        def pair(names: Sequence[str]) -> MeasurePairing:
            values = ours.value(names), theirs.value(names)  # noqa: B023
            drawn = np.mean([after[name] - before[name] for name in names], axis=0)  # noqa: B023
            difference, interval = values[1] - values[0], interval_of(drawn)
            count = ours.count(names)  # noqa: B023
            return MeasurePairing(tuple(names), count, *values, difference, *interval, bootstrap_p(drawn), None)

        found[measure] = MeasurePairings(
            _family({name: pair([name]) for name in languages}),
            {
                grouping: _family({level: pair(names) for level, names in groups.items()})
                for grouping, groups in levels.items()
                if groups
            },
            pair(languages),
        )
    return found


P = TypeVar("P", Pairing, MeasurePairing)


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
        whole = _read(folder / SETTINGS)
        if not isinstance(whole, dict) or not all(
            isinstance(whole.get(key), dict) for key in ("settings", "languages")
        ):
            raise DataError(f"{folder / SETTINGS}:1: not the settings of an evaluation")
        self.settings, self.languages = whole["settings"], whole["languages"]
        self.scored = whole["scoring"] if isinstance(whole.get("scoring"), dict) else {}
        scores = folder / "scores.json"
        found = _read(scores) if scores.is_file() else {}
        found = found if isinstance(found, dict) else {}
        self.scoring = found["scoring"] if isinstance(found.get("scoring"), dict) else {}
        self.measures = list(found["measures"]) if isinstance(found.get("measures"), dict) else []

    def answers(self, language: str) -> list[tuple[str, int]]:
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


def _answers(entries: list[dict[str, Any]]) -> list[tuple[str, int]]:
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
    for name in measures:
        if group_size(name) is not None:
            rights = [entry["measures"][name] for entry in entries if name in entry.get("measures", {})]
            rows[name] = [[int(right), 1] for right in rights]
            good = bool(rights) and all(isinstance(right, bool) for right in rights)
        elif name not in METRICS:
            rows[name] = [entry["measures"][name] for entry in entries]
            good = all(
                isinstance(nats, float) and isfinite(nats) and type(tokens) is int and tokens > 0
                for nats, tokens in rows[name]
            )
        else:
            good = True
        if not good:
            raise ValueError
    return [str(entry["id"]) for entry in entries], rows


def _read(path: Path) -> Any:
    """A file that layalign wrote; predictions hold every text."""
    return read_json(path, where=f"{path}:1: not a file that layalign wrote", most=MAX_WHOLE_BYTES, error=DataError)
