"""Evaluation: generate an answer to every test question, read it, count.

Scores are those of the published code: the last number within 0.001 for math, the whole answer equal to the label
otherwise. What is generated does not depend on the order: batches are sorted by length, results come in file order.
"""

from __future__ import annotations

import functools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any

import torch

from layalign._files import write_whole
from layalign.data.collator import STAGES, LayAlignCollator
from layalign.data.examples import Example, ReadReport
from layalign.data.languages import language_of
from layalign.data.numbers import find_number
from layalign.data.readers import Spec, by_language, load_examples
from layalign.errors import ArgumentError, NonFiniteError, one_of, refuse, shown, whole_number
from layalign.evaluation.answering import (
    ModelAnswers,
    evaluation_mode,
    llm_alone,
    model_fingerprint,
    settings_fingerprint,
)
from layalign.evaluation.intervals import Interval
from layalign.evaluation.levels import LevelScore, Outcomes, average_interval, level_scores
from layalign.evaluation.metrics import last_number, parse_label, same_number, wilson_interval
from layalign.evaluation.processes import Processes
from layalign.evaluation.store import OutputStore
from layalign.tokenization import tokenizers_hash

__all__ = ["TASKS", "EvaluationResult", "LanguageScore", "Task", "evaluate", "llm_alone"]
logger = logging.getLogger(__name__)
SCORERS = ("number", "signed-number", "label", "text")
NUMERIC = ("mgsm", "msvamp")  # formats whose targets are numbers


@dataclass(frozen=True)
class Task:
    """What is special about a task: the format of its files, how an answer is scored, and how long it may be."""

    format: str
    scorer: str
    max_new_tokens: int


TASKS = {
    "mgsm": Task("mgsm", "number", 512),
    "msvamp": Task("msvamp", "number", 512),
    "math": Task("math", "number", 512),
    "xnli": Task("xnli", "label", 16),
    "x-csqa": Task("x-csqa", "label", 16),
    "xcopa": Task("xcopa", "label", 16),
    "jsonl": Task("jsonl", "text", 256),
    "tsv": Task("tsv", "text", 256),
}


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
        scores: by English language name, in the order of the data.
        report: which files were read and which malformed lines were left out.
        output_dir: where predictions and scores were written.
        outcomes: by language, each question's id and whether its answer is right; averages get their intervals from it.
        scoring: the scorer and how labels are matched.
        cut: how many questions had their "source" or "prompt" cut, an "answer" without an end within `max_new_tokens`,
            or together were longer than the LLM's positions ("context").
    """

    task: str
    scores: dict[str, LanguageScore]
    report: ReadReport = field(default_factory=ReadReport)
    output_dir: Path | None = None
    outcomes: dict[str, Outcomes] = field(default_factory=dict, repr=False)
    scoring: dict[str, str] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)

    @property
    def average(self) -> float:
        """Mean of the languages' accuracies, as published."""
        return sum(score.accuracy for score in self.scores.values()) / len(self.scores)

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
        return {
            "task": self.task,
            "average": round(self.average, 2),
            "languages": {name: asdict(score) for name, score in self.scores.items()},
            "files": self.report.files,
            "skipped": [str(line) for line in self.report.skipped],
            "average_interval": None if self.average_interval is None else asdict(self.average_interval),
            "levels": {
                grouping: {level: asdict(score) for level, score in scores.items()}
                for grouping, scores in self.levels.items()
            },
            "scoring": self.scoring,
            "cut": self.cut,
        }

    def to_tsv(self) -> str:
        """One line per language behind a header line, the average of all, and those by level ("Average joshi high")."""
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
        failed = sum(score.failed for score in self.scores.values())
        nan = f", {failed} answers failed (logits not finite)" if failed else ""
        table = Table(title=f"{self.task}: accuracy{skipped}{cut}{nan}")
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


def evaluate(
    model: Any,
    encoder_tokenizer: Any,
    llm_tokenizer: Any,
    task: str,
    data: Spec | Sequence[Example],
    output_dir: str | Path,
    *,
    languages: Sequence[str] | None = None,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    resume: bool = True,
    scorer: str | None = None,
    label_match: str = "exact",
    stage: str = "task",
    max_source_length: int = 512,
    max_prompt_length: int = 512,
    generation: Mapping[str, Any] | None = None,
    model_name: str | None = None,
    non_finite: str = "stop",
    progress: bool = False,
) -> EvaluationResult:
    """Evaluate a model, or anything that answers, on a task in every language.

    With a process group (torch.distributed) all its processes call this and share the questions; the files and the
    result are those of one process.

    Args:
        model: a `LayAlignForCausalLM`, an object with the same `generate` and ids in its `config`, or a function from
            a list of examples to their answers (see `llm_alone`), None for an answer that failed.
        encoder_tokenizer, llm_tokenizer: the model's tokenizers; None for a function.
        task: one of `TASKS`.
        data: what to read (a folder, a file, or any spec of `layalign.data.readers`), or the examples themselves.
        output_dir: gets `predictions/<language>.json`, `scores.json` and `scores.tsv`; and, while it runs,
            `predictions/<language>.jsonl` and `settings.json`, from which a rerun goes on.
        languages: names or codes of the languages to evaluate; None is all.
        batch_size: questions per batch.
        max_new_tokens: longest answer; None is the task's own (512 for math).
        limit: only the first questions of each language.
        skip_bad: leave malformed lines out and count them; otherwise the first one raises.
        resume: go on with what is in `output_dir`; False deletes the outputs there and starts anew.
        scorer: "number" (published), "signed-number" (each language's own way of writing numbers), "label" or "text"
            (equal after stripping); None is the task's own. An empty answer is no number.
        label_match: "exact" (published) or "start"; see `layalign.evaluation.metrics.parse_label`.
        stage: "task" gives the LLM the prompt, "translation" only the encoder's tokens.
        max_source_length, max_prompt_length: longest texts in tokens; what is longer is cut and counted.
        generation: further arguments of `generate` (num_beams, ...); greedy search without any.
        model_name: name of a function or of a model without parameters, for the check that a rerun is of the same one.
        non_finite: what becomes of an answer whose logits were NaN or infinite. "stop" raises, for the cause (fp16, a
            damaged checkpoint) seldom concerns one answer alone; "fail" counts it as wrong, under `failed`.
        progress: show a progress bar.

    Raises:
        NonFiniteError: logits were not finite; the text names the example. The answers before it are kept.
        ArgumentError: an argument is none of those expected, or `output_dir` holds the outputs of another run, or
            another run writes into it.
        DataError: no data, or a malformed line.
    """
    kind = _task(task, scorer, label_match)
    one_of("non_finite", non_finite, ("stop", "fail"))
    for name, number in (("batch_size", batch_size), ("limit", limit), ("max_new_tokens", max_new_tokens)):
        if (number is not None or name == "batch_size") and whole_number(name, number) < 1:
            raise ArgumentError(f"{name}: expected a number >= 1, got {number}")
    _check_types(output_dir, generation, model_name, max_source_length, max_prompt_length, resume, skip_bad)
    examples, report = _examples(data, kind, languages, limit, skip_bad)
    new_tokens = kind.max_new_tokens if max_new_tokens is None else max_new_tokens
    options = dict(generation or {})
    answer = model
    one_of("stage", stage, STAGES)
    if hasattr(model, "generate"):
        lengths = {"max_source_length": max_source_length, "max_prompt_length": max_prompt_length}
        collator = LayAlignCollator.from_model(
            model, encoder_tokenizer, llm_tokenizer, stage=stage, with_targets=False, **lengths
        )
        answer = ModelAnswers(model, collator, new_tokens, options)
    elif not callable(model) or isinstance(model, type):
        raise ArgumentError(f"model: expected something with generate, or a function, got {type(model).__name__}")
    settings = {
        "task": task,
        "stage": stage,
        "max_new_tokens": new_tokens,
        "max_source_length": max_source_length,
        "max_prompt_length": max_prompt_length,
        "generation": {key: repr(value) for key, value in sorted(options.items())},
        "model": model_name or model_fingerprint(model),
        # Only where padding is attended do outputs depend on the batch.
        "batch_size": None if getattr(getattr(model, "config", None), "mask_encoder_padding", True) else batch_size,
    }
    if isinstance(answer, ModelAnswers):
        settings["tokenizers"] = tokenizers_hash(encoder_tokenizer, llm_tokenizer)[:16]
        settings["model_settings"] = settings_fingerprint(model)
    processes = Processes()
    scores, outcomes = {}, {}
    with (
        processes.all_held(output_dir),
        evaluation_mode(model),
        torch.no_grad(),
        _bar(progress and processes.main, len(examples)) as advance,
    ):
        store = processes.all_get(lambda: OutputStore(Path(output_dir), settings, resume))
        for language, group in by_language(examples).items():
            outputs = _outputs(answer, store, language, group, batch_size, advance, processes, non_finite == "fail")
            scores[language], outcomes[language] = processes.all_get(
                functools.partial(_score, store, language, group, outputs, kind, label_match)
            )
        scoring = {"scorer": kind.scorer, "label_match": label_match}
        cut = processes.all_get(store.count_cut)
        result = EvaluationResult(task, scores, report, Path(output_dir), outcomes, scoring, cut)
        processes.all_get(lambda: _write(result, store.folder))
    if processes.main and any(cut.values()):
        found = ", ".join(f"{count} of {kind}" for kind, count in cut.items() if count)
        logger.warning("cut, of %d questions: %s", len(examples), found)
    return result


def _write(result: EvaluationResult, folder: Path) -> None:
    write_whole(
        folder / "scores.json", json.dumps(result.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )
    write_whole(folder / "scores.tsv", result.to_tsv())


def _check_types(
    output_dir: Any, generation: Any, model_name: Any, source_length: Any, prompt_length: Any, *flags: Any
) -> None:
    if not isinstance(output_dir, str | Path) or not str(output_dir).isprintable():
        refuse("output_dir", "a folder", output_dir)
    if not isinstance(generation, Mapping | None) or not all(isinstance(key, str) for key in generation or ()):
        refuse("generation", "a mapping of arguments of generate", generation)
    if not isinstance(model_name, str | None):
        refuse("model_name", "text", model_name)
    whole_number("max_source_length", source_length, least=1)
    whole_number("max_prompt_length", prompt_length, least=1)
    for name, flag in zip(("resume", "skip_bad"), flags, strict=True):
        if not isinstance(flag, bool):
            refuse(name, "true or false", flag)


def _task(task: str, scorer: str | None, label_match: str) -> Task:
    one_of("task", task, TASKS)
    kind = TASKS[task] if scorer is None else Task(TASKS[task].format, scorer, TASKS[task].max_new_tokens)
    one_of("scorer", kind.scorer, SCORERS)
    if not isinstance(label_match, str) or label_match not in ("exact", "start"):
        refuse("label_match", "'exact' or 'start'", label_match)
    return kind


def _examples(
    data: Spec | Sequence[Example], kind: Task, languages: Sequence[str] | None, limit: int | None, skip_bad: bool
) -> tuple[list[Example], ReadReport]:
    if not (isinstance(data, Sequence) and not isinstance(data, str) and data and isinstance(data[0], Example)):
        return load_examples(
            data,  # type: ignore[arg-type]
            format=kind.format,
            languages=languages,
            limit=limit,
            skip_bad=skip_bad,
            split="test",
        )
    groups = by_language(data)  # type: ignore[arg-type]
    if languages is not None:
        if isinstance(languages, str | bytes) or not isinstance(languages, Sequence) or not languages:
            refuse("languages", "a list of names or codes", languages)
        names = [language_of(language).name for language in languages]
        missing = [name for name in names if name not in groups]
        if missing:
            raise ArgumentError(f"languages: expected some of {', '.join(groups)}, got {missing[0]}")
        groups = {name: groups[name] for name in names}
    examples = [example for group in groups.values() for example in group[:limit]]
    return examples, ReadReport(counts=Counter(example.language for example in examples))


def _outputs(
    answer: Callable[[Sequence[Example]], Sequence[str | None]],
    store: OutputStore,
    language: str,
    examples: Sequence[Example],
    batch_size: int,
    advance: Callable[[str, int], None],
    processes: Processes,
    keep_failed: bool,
) -> list[str | None]:
    """An answer to every example, in their order, None for one that failed; those in the store are not asked for again.

    Each process answers one batch of a round; the main one keeps them all before the next round.
    """
    done = processes.all_get(lambda: store.begin(language, examples))
    done = {i: text for i, text in done.items() if keep_failed or text is not None}
    advance(language, len(done))
    # The longest first: a batch that does not fit into memory fails at once.
    rest = sorted(
        (i for i in range(len(examples)) if i not in done),
        key=lambda i: (-len(examples[i].source) - len(examples[i].prompt), i),
    )
    batches = [rest[start : start + batch_size] for start in range(0, len(rest), batch_size)]
    for together in processes.deal(batches):
        # Without a batch of its own a process answers the first one too: the weights may be spread over all of them.
        own = together[processes.rank] if processes.rank < len(together) else together[0]
        texts = list(answer([examples[i] for i in own]))
        if len(texts) != len(own) or not all(isinstance(text, str | None) for text in texts):
            raise ArgumentError(f"model: expected {len(own)} texts, one per example, got {len(texts)}")
        # Half of a surrogate pair cannot stand in a file.
        texts = [text and text.encode("utf-8", errors="replace").decode("utf-8") for text in texts]
        # Whoever answers may say what was cut.
        cut = dict(zip(own, getattr(answer, "last_cut", ()), strict=False))
        found = processes.all_gather({i: (text, cut.get(i, ())) for i, text in zip(own, texts, strict=True)})
        gathered = {i: answered for batch in found[: len(together)] for i, answered in batch.items()}
        failed = [] if keep_failed else sorted(i for i, (text, _) in gathered.items() if text is None)
        gathered = {i: answered for i, answered in gathered.items() if i not in failed}
        new = {i: text for i, (text, _) in gathered.items()}
        processes.all_get(
            functools.partial(store.append, language, new, {i: kinds for i, (_, kinds) in gathered.items()})
        )
        done.update(new)
        advance(language, len(new))
        if failed:
            example, others = examples[failed[0]], f" and {len(failed) - 1} more" if failed[1:] else ""
            raise NonFiniteError(
                f"model: expected finite logits, got NaN or infinity for {language} example {failed[0] + 1} of "
                f"{len(examples)} (id {example.id!r}, {shown(example.source)}){others}; non_finite='fail' counts such "
                "answers as wrong"
            )
    return [done[i] for i in range(len(examples))]


def _number(text: str, signed: bool, language: str | None) -> float | None:
    """The number that a text says; as published, one without digits says 0, but an empty one says nothing."""
    if not signed:
        return last_number(text) if text.strip() else None
    found = find_number(text, language)
    return None if found is None else float(found)


def _judge(example: Example, output: str | None, kind: Task, label_match: str) -> tuple[Any, Any, bool]:
    """(gold, what the output says, whether they agree); None says nothing, and agrees with nothing."""
    if kind.scorer in ("number", "signed-number"):
        signed = kind.scorer == "signed-number"
        # The readers of the math test sets give plain digits already.
        gold = _number(example.target, signed, None if kind.format in NUMERIC else example.language)
        parsed = _number(output or "", signed, example.language)
        return gold, parsed, same_number(parsed, gold)
    if output is None:
        return example.target, None, False
    if kind.scorer == "label":
        label = parse_label(output, example.choices or (example.target,), label_match)
        return example.target, label, label == example.target
    return example.target, output.strip(), output.strip() == example.target.strip()


def _score(
    store: OutputStore,
    language: str,
    examples: Sequence[Example],
    outputs: Sequence[str | None],
    kind: Task,
    match: str,
) -> tuple[LanguageScore, Outcomes]:
    """Judge the outputs of a language and write its predictions."""
    predictions, outcomes = [], []
    for number, (example, output) in enumerate(zip(examples, outputs, strict=True)):
        gold, parsed, right = _judge(example, output, kind, match)
        outcomes.append((example.id, right))
        predictions.append(
            {
                "id": example.id,
                "question": example.source,
                "prompt": example.prompt,
                # JSON has no infinity, which an endless row of digits reads as.
                "gold": gold if gold != inf else str(gold),
                "output": output,
                "parsed": parsed if parsed not in (inf, -inf) else str(parsed),
                "correct": right,
            }
        )
        if kinds := store.cut[language].get(number):
            predictions[-1]["cut"] = kinds
    text = json.dumps(predictions, indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(store.path_of(language, ".json"), text + "\n")
    correct, count = sum(right for _, right in outcomes), len(examples)
    low, high = wilson_interval(correct, count)
    failed = sum(output is None for output in outputs)
    return LanguageScore(language, correct, count, 100 * correct / count, 100 * low, 100 * high, failed), outcomes


@contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[str, int], None]]:
    """A function that advances a progress bar, or does nothing."""
    if not shown:
        yield lambda language, count: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("evaluating", total=total)
        yield lambda language, count: bar.update(task, advance=count, description=language)
