"""What an evaluation found, as a table, as JSON and as TSV."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import nan
from pathlib import Path
from typing import Any

from layalign.data.examples import ReadReport
from layalign.evaluation.intervals import Interval
from layalign.evaluation.levels import LevelScore, Outcomes, average_interval, level_scores
from layalign.evaluation.measures import MeasureScores


@dataclass(frozen=True)
class LanguageScore:
    """Accuracy of one language in percent, with its 95% Wilson interval.

    `failed` counts the answers whose logits were not finite; they are wrong ones.
    """

    language: str
    correct: int
    count: int
    accuracy: float
    low: float
    high: float
    failed: int = 0


@dataclass
class EvaluationResult:
    """Scores of a run.

    Attributes:
        task: name of the task.
        scores: by English language name, in the order of the data; empty for translation.
        report: which files were read and which malformed lines were left out.
        output_dir: where predictions and scores were written.
        outcomes: by language, each question's id and whether its answer is right; averages get their intervals from it.
        scoring: the scorer and how labels are matched.
        cut: how many questions had their "source" or "prompt" cut, an "answer" without an end within `max_new_tokens`,
            or together were longer than the LLM's positions ("context").
        measures: of translation, by name (`layalign.evaluation.measures`); empty for other tasks.
        failed: translations whose logits were not finite; an empty one stands for each.
    """

    task: str
    scores: dict[str, LanguageScore]
    report: ReadReport = field(default_factory=ReadReport)
    output_dir: Path | None = None
    outcomes: dict[str, Outcomes] = field(default_factory=dict, repr=False)
    scoring: dict[str, str] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    measures: dict[str, MeasureScores] = field(default_factory=dict)
    failed: int = 0

    @property
    def average(self) -> float:
        """Mean of the languages' accuracies, as published; NaN for translation, whose averages are in `measures`."""
        return sum(score.accuracy for score in self.scores.values()) / len(self.scores) if self.scores else nan

    @cached_property
    def average_interval(self) -> Interval | None:
        """95% bootstrap interval of the average (`layalign.evaluation.intervals`); None without outcomes."""
        return average_interval(self.outcomes) if self.outcomes else None

    @cached_property
    def levels(self) -> dict[str, dict[str, LevelScore]]:
        """Averages by resource level: grouping, level, score (`layalign.evaluation.levels`)."""
        return level_scores(self.task, self.outcomes)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        found: dict[str, Any] = {"task": self.task}
        if self.measures:
            found["measures"] = {name: asdict(scores) for name, scores in self.measures.items()}
        else:
            found["average"] = round(self.average, 2)
            found["languages"] = {name: asdict(score) for name, score in self.scores.items()}
        found["files"], found["skipped"] = self.report.files, [str(line) for line in self.report.skipped]
        if not self.measures:
            found["average_interval"] = None if self.average_interval is None else asdict(self.average_interval)
            found["levels"] = {
                grouping: {level: asdict(score) for level, score in scores.items()}
                for grouping, scores in self.levels.items()
            }
        found.update(scoring=self.scoring, cut=self.cut)
        return {**found, "failed": self.failed} if self.measures else found

    def to_tsv(self) -> str:
        """A header line, a line per language, the average, and averages by level ("Average joshi high").

        For translation there are such lines for each measure, named in a second column.
        """
        if self.measures:
            lines = ["language\tmeasure\tvalue\tlow\thigh\tcount"]
            for name, scores in self.measures.items():
                for row, score in _measure_rows(scores).items():
                    numbers = f"{score.value:.4f}\t{score.low:.4f}\t{score.high:.4f}\t{score.count}"
                    lines.append(f"{row}\t{name}\t{numbers}")
            return "\n".join(lines) + "\n"
        lines = ["language\taccuracy\tcorrect\tcount\tlow\thigh"]
        for s in self.scores.values():
            lines.append(f"{s.language}\t{s.accuracy:.2f}\t{s.correct}\t{s.count}\t{s.low:.2f}\t{s.high:.2f}")
        ends = "\t" if (all_ := self.average_interval) is None else f"{all_.low:.2f}\t{all_.high:.2f}"
        lines.append(f"Average\t{self.average:.2f}\t\t{sum(s.count for s in self.scores.values())}\t{ends}")
        for grouping, level, score in self._level_rows():
            count = sum(self.scores[name].count for name in score.languages)
            lines.append(
                f"Average {grouping} {level}\t{score.average:.2f}\t\t{count}\t{score.low:.2f}\t{score.high:.2f}"
            )
        return "\n".join(lines) + "\n"

    def table(self) -> Any:
        """A `rich` table for the terminal."""
        from rich.markup import escape
        from rich.table import Table

        skipped = f", {len(self.report.skipped)} malformed lines left out" if self.report.skipped else ""
        cut = "".join(f", {count} of {kind} cut" for kind, count in self.cut.items() if count)
        failed = self.failed + sum(score.failed for score in self.scores.values())
        bad = f", {failed} answers failed (logits not finite)" if failed else ""
        what = "values with 95% intervals" if self.measures else "accuracy"
        table = Table(title=f"{self.task}: {what}{skipped}{cut}{bad}")
        if self.measures:
            table.add_column("language")
            for name in self.measures:
                table.add_column(name, justify="right")
            columns = [_measure_rows(scores) for scores in self.measures.values()]
            for row in columns[0]:
                cells = [f"{(s := column[row]).value:.2f} ({s.low:.2f} - {s.high:.2f})" for column in columns]
                table.add_row(escape(row), *cells, end_section=row == list(columns[0])[-1])
            return table
        table.add_column("language")
        for name in ("accuracy %", "95% interval", "correct", "of"):
            table.add_column(name, justify="right")
        for s in self.scores.values():
            table.add_row(
                escape(s.language), f"{s.accuracy:.1f}", f"{s.low:.1f} - {s.high:.1f}", str(s.correct), str(s.count)
            )
        table.add_section()
        ends = "" if (all_ := self.average_interval) is None else f"{all_.low:.1f} - {all_.high:.1f}"
        table.add_row("average", f"{self.average:.1f}", ends, "", "")
        for grouping, level, score in self._level_rows():
            row = f"{level} ({grouping}, {len(score.languages)})"
            table.add_row(row, f"{score.average:.1f}", f"{score.low:.1f} - {score.high:.1f}", "", "")
        return table

    def _level_rows(self) -> list[tuple[str, str, LevelScore]]:
        return [(grouping, level, score) for grouping, of in self.levels.items() for level, score in of.items()]


def _measure_rows(scores: MeasureScores) -> dict[str, Any]:
    """The rows of a table: languages, the average of all, and those by level."""
    levels = {f"Average {grouping} {name}": s for grouping, of in scores.levels.items() for name, s in of.items()}
    return {**scores.languages, "Average": scores.average, **levels}
