"""Is one run better than another? Both answered the same questions, so the answers are compared in pairs.

Per language: McNemar's exact test on the questions that only one run got right, and the difference of the accuracies
with its paired bootstrap interval. Over several languages the questions are the same again, translated: a pooled
McNemar test, for which every answer stands alone, is then too sure; an exact test over the questions stands beside it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from layalign._reading import read_json
from layalign.errors import ArgumentError, DataError, refuse, whole_number
from layalign.evaluation.intervals import holm, is_parallel, macro_interval, sign_flip_p
from layalign.evaluation.levels import GROUPINGS, by_level
from layalign.evaluation.store import SETTINGS, prediction_path
from layalign.limits import MAX_WHOLE_BYTES


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
        if by not in ("language", "level"):
            raise ArgumentError(f"by: expected 'language' or 'level', got {by!r}")
        if by == "language":
            return self.languages
        if grouping not in GROUPINGS:
            raise ArgumentError(f"grouping: expected one of {', '.join(GROUPINGS)}, got {grouping!r}")
        if grouping not in self.levels:
            raise ArgumentError(f"grouping: expected one with levels for {self.task}, got {grouping!r}")
        return self.levels[grouping]


def _cells(pairing: Pairing) -> list[str]:
    numbers = [f"{pairing.a:.1f}", f"{pairing.b:.1f}", f"{pairing.difference:+.1f}"]
    numbers += [f"{pairing.low:+.1f}, {pairing.high:+.1f}", f"{pairing.only_a} : {pairing.only_b}"]
    return numbers + ["" if p is None else f"{p:.2g}" for p in (pairing.p, pairing.p_holm, pairing.p_questions)]


def mcnemar(only_a: int, only_b: int) -> float:
    """McNemar's exact test: the two-sided binomial p of the discordant counts; 1.0 where there are none."""
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0


def compare_runs(run_a: str | Path, run_b: str | Path, *, seed: int = 0) -> Comparison:
    """Compare two finished evaluations of the same test data.

    Args:
        run_a, run_b: output folders of `evaluate`.
        seed: of the bootstrap.

    Raises:
        ArgumentError: a folder holds no finished evaluation, or the runs have different tasks, questions, scoring, or
            no language in common.
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
    if a.scoring != b.scoring and a.scoring and b.scoring:
        raise ArgumentError(f"run_b: expected answers scored as those of run_a, got {a.scoring} and {b.scoring}")
    both = [name for name in a.languages if name in b.languages]
    if not both:
        found = f"{', '.join(a.languages) or 'none'} and {', '.join(b.languages) or 'none'}"
        raise ArgumentError(f"run_b: expected a language that run_a has, got {found}")
    answers = {}
    for name in both:
        if a.languages[name] != b.languages[name]:
            raise ArgumentError(f"run_b: expected the {name} questions of run_a, got other ones")
        answers[name] = _Answers(a.answers(name), b.answers(name))
    task = str(a.settings.get("task"))
    levels = {grouping: by_level(both, task, grouping) for grouping in GROUPINGS}
    keys = [key for key in {**a.settings, **b.settings} if a.settings.get(key) != b.settings.get(key)]
    return Comparison(
        task=task,
        a=str(run_a),
        b=str(run_b),
        languages=_family({name: _pair([name], answers, seed) for name in both}),
        levels={
            grouping: _family({level: _pair(names, answers, seed) for level, names in groups.items()})
            for grouping, groups in levels.items()
            if groups
        },
        pooled=_pair(both, answers, seed),
        only_in_a=tuple(name for name in a.languages if name not in b.languages),
        only_in_b=tuple(name for name in b.languages if name not in a.languages),
        settings={key: (a.settings.get(key), b.settings.get(key)) for key in keys},
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


def _family(pairings: dict[str, Pairing]) -> dict[str, Pairing]:
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
        scores = folder / "scores.json"
        found = _read(scores) if scores.is_file() else {}
        self.scoring = found.get("scoring") if isinstance(found, dict) else None

    def answers(self, language: str) -> list[tuple[str, int]]:
        path = prediction_path(self.folder, language, ".json")
        if not path.is_file():
            raise ArgumentError(f"{self.name}: expected a finished evaluation, got none of {language} in {self.folder}")
        try:
            entries = _read(path)
            answers = [(str(entry["id"]), int(entry["correct"])) for entry in entries]
            whole = len(answers) == self.languages[language]["count"]
            whole = whole and all(isinstance(entry["correct"], bool) for entry in entries)
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            raise DataError(f"{path}:1: not the predictions of the evaluation, expected a file that layalign wrote")
        return answers


def _read(path: Path) -> Any:
    """A file that layalign wrote; predictions hold every text."""
    return read_json(path, where=f"{path}:1: not a file that layalign wrote", most=MAX_WHOLE_BYTES, error=DataError)
