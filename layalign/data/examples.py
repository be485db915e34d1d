"""What the readers give: examples, and a report of what was read and what was left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from layalign.utils.errors import DataError


@dataclass(frozen=True, slots=True)
class Example:
    """One training or test sample.

    Attributes:
        source: text for the encoder, in `language`.
        target: text the LLM should write (for tests: the gold answer).
        language: English name, as in `layalign.data.languages`.
        prompt: text for the LLM in the task stage; "" in the translation stage.
        id: the sample's own id, or its line number in the file.
        choices: the answers to choose from ("A", "B", ... or label words); () for free answers.
    """

    source: str
    target: str
    language: str
    prompt: str = ""
    id: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SkippedLine:
    """A line that was left out, and why."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


@dataclass
class ReadReport:
    """What was read.

    Attributes:
        files: paths (or dataset names) in reading order.
        counts: examples per language, by English name.
        skipped: the malformed lines left out; always empty without `skip_bad`.
        headers: the header lines that were recognised ("file: names of the columns").
    """

    files: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    skipped: list[SkippedLine] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Examples read, all languages together."""
        return sum(self.counts.values())

    def merge(self, other: ReadReport) -> None:
        """Add another report's files, counts, skipped lines and headers to this one."""
        self.files += other.files
        self.counts += other.counts
        self.skipped += other.skipped
        self.headers += other.headers

    def summary(self, show: int = 5) -> str:
        """A few lines for a person: the totals, the header lines, and the first `show` skipped lines."""
        lines = [f"read {self.total} examples, {len(self.counts)} languages, {len(self.files)} files"]
        if self.headers:
            lines.append(f"{len(self.headers)} header lines, as {self.headers[0]}")
        if self.skipped:
            lines.append(f"left out {len(self.skipped)} malformed lines:")
            lines += [f"  {line}" for line in self.skipped[:show]]
            if len(self.skipped) > show:
                lines.append(f"  ... and {len(self.skipped) - show} more")
        return "\n".join(lines)


class BadRecord(DataError):
    """A line or record that cannot be used; the reader of the file adds the path and the line."""


@dataclass
class Collected:
    """Collects the examples that are wanted, and raises or lists malformed lines.

    Args:
        wanted: English names of the languages to keep, in order; None keeps all.
        limit: most examples per language.
        skip_bad: leave malformed lines out, and list them in `report`, where otherwise the first one raises.
    """

    wanted: tuple[str, ...] | None = None
    limit: int | None = None
    skip_bad: bool = False
    report: ReadReport = field(default_factory=ReadReport)
    examples: list[Example] = field(default_factory=list)

    def takes(self, language: str) -> bool:
        """Whether more examples of a language are wanted."""
        if self.wanted is not None and language not in self.wanted:
            return False
        return self.limit is None or self.report.counts[language] < self.limit

    def add(self, example: Example) -> None:
        """Keep an example, if it is wanted."""
        if self.takes(example.language):
            self.report.counts[example.language] += 1
            self.examples.append(example)

    def bad(self, path: str, line: int, reason: str) -> None:
        """Raise DataError for a malformed line, or list it when they are left out."""
        skipped = SkippedLine(path, line, reason)
        if not self.skip_bad:
            raise DataError(str(skipped))
        self.report.skipped.append(skipped)
