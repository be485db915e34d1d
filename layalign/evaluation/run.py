"""Evaluation: generate an answer to every test question, read it, count; or measure translations and likelihoods.

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
from math import inf, isfinite, nan
from pathlib import Path
from typing import Any

import torch

from layalign.data.collator import LayAlignCollator
from layalign.data.examples import Example, ReadReport
from layalign.data.languages import language_of
from layalign.data.readers import Spec, by_language, load_examples
from layalign.evaluation.answering import (
    ModelAnswers,
    evaluation_mode,
    llm_alone,
    model_fingerprint,
    settings_fingerprint,
)
from layalign.evaluation.intervals import Interval
from layalign.evaluation.levels import LevelScore, Outcomes, average_interval, level_scores
from layalign.evaluation.likelihood import LABELS, Likelihoods, best_label, right_ones
from layalign.evaluation.measures import MeasureScores, Sentences, check_measures, group_size, require_groups
from layalign.evaluation.metrics import wilson_interval
from layalign.evaluation.store import OutputStore
from layalign.evaluation.tasks import LIKELIHOODS, NUMERIC, SCORERS, TASKS, Task, check_labels, judge, task_of
from layalign.evaluation.translation import METRICS, metric_of, score_of, translation_scores
from layalign.modeling.tokenization import tokenizers_hash
from layalign.utils.errors import ArgumentError, NonFiniteError, one_of, refuse, shown, whole_number
from layalign.utils.files import write_whole
from layalign.utils.processes import Processes

__all__ = ["NUMERIC", "SCORERS", "TASKS", "EvaluationResult", "LanguageScore", "Task", "evaluate", "llm_alone"]
logger = logging.getLogger(__name__)


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
        if self.measures:
            return {
                "task": self.task,
                "measures": {name: asdict(scores) for name, scores in self.measures.items()},
                "files": self.report.files,
                "skipped": [str(line) for line in self.report.skipped],
                "scoring": self.scoring,
                "cut": self.cut,
                "failed": self.failed,
            }
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
        """One line per language behind a header line, the average of all, and those by level ("Average joshi high").

        For translation such lines for each measure, which has a column of its own.
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
    measures: Sequence[str] | None = None,
    stage: str | None = None,
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
            a list of examples to their answers (see `llm_alone`), None for an answer that failed. Likelihoods are
            measured of a `LayAlignForCausalLM` and of what `llm_alone` returns.
        encoder_tokenizer, llm_tokenizer: the model's tokenizers; None for a function.
        task: one of `TASKS`.
        data: what to read (a folder, a file, or any spec of `layalign.data.readers`), or the examples themselves.
        output_dir: gets `predictions/<language>.json`, `scores.json` and `scores.tsv`; and, while it runs,
            `predictions/<language>.jsonl` and `settings.json`, from which a rerun goes on.
        languages: names or codes of the languages to evaluate; None is all.
        batch_size: questions, or texts whose likelihood is measured, per batch.
        max_new_tokens: longest answer; None is the task's own (512 for math).
        limit: only the first questions of each language.
        skip_bad: leave malformed lines out and count them; otherwise the first one raises.
        resume: go on with what is in `output_dir`; False deletes the outputs there and starts anew.
        scorer: "number" (published), "signed-number" (each language's own way of writing numbers), "label", "text"
            (equal after stripping) or "translation" (`measures`); None is the task's own. An empty answer is no number.
            "label-likelihood" generates nothing: the answer is the label with the highest log-probability, its end
            included, given the question; "label-likelihood-mean" takes each label's mean over its tokens. Where two
            labels share the highest value, none is the answer.
        label_match: "exact" (published) or "start"; see `layalign.evaluation.metrics.parse_label`.
        measures: of translation: "chrf", "bleu", "nats", "nats-other-source", "right-one-of-N" (N of a language's
            sentences in a row; those left at the end are not counted), see `layalign.evaluation.measures`. None is
            chrF and BLEU. A rerun may ask for others; nothing is measured twice.
        stage: "task" gives the LLM the prompt, "translation" only the encoder's tokens; None is the task's own.
        max_source_length, max_prompt_length: longest texts in tokens; what is longer is cut and counted.
        generation: further arguments of `generate` (num_beams, ...); greedy search without any.
        model_name: name of a function or of a model without parameters, for the check that a rerun is of the same one.
        non_finite: what becomes of an answer whose logits were NaN or infinite. "stop" raises, for the cause (fp16, a
            damaged checkpoint) seldom concerns one answer alone; "fail" counts it as wrong, under `failed`. A
            likelihood that is not finite always raises.
        progress: show a progress bar.

    Raises:
        NonFiniteError: logits were not finite; the text names the example. The answers before it are kept.
        ArgumentError: an argument is none of those expected, or `output_dir` holds the outputs of another run, or
            another run writes into it.
        DataError: no data, or a malformed line.
        BackendError: sacrebleu is not installed, which chrF and BLEU need.
    """
    one_of("non_finite", non_finite, ("stop", "fail"))
    for name, number in (("batch_size", batch_size), ("limit", limit), ("max_new_tokens", max_new_tokens)):
        if (number is not None or name == "batch_size") and whole_number(name, number) < 1:
            raise ArgumentError(f"{name}: expected a number >= 1, got {number}")
    _check_types(output_dir, generation, model_name, max_source_length, max_prompt_length, resume, skip_bad)
    kind = task_of(task, scorer, stage, max_new_tokens)
    if not isinstance(label_match, str) or label_match not in ("exact", "start"):
        refuse("label_match", "'exact' or 'start'", label_match)
    asked = _asked(kind, measures)
    examples, report = _examples(data, kind, languages, limit, skip_bad)
    groups = by_language(examples)
    require_groups(asked, {language: len(group) for language, group in groups.items()})
    if kind.scorer in LIKELIHOODS:
        for example in examples:
            check_labels(example)
    options = dict(generation or {})
    likelihoods = [name for name in asked if name not in METRICS]
    answer = model
    if hasattr(model, "generate"):
        lengths = {"max_source_length": max_source_length, "max_prompt_length": max_prompt_length}
        tokenizers = encoder_tokenizer, llm_tokenizer
        make = functools.partial(LayAlignCollator.from_model, model, *tokenizers, stage=kind.stage, **lengths)
        answer = ModelAnswers(model, make(with_targets=False), kind.max_new_tokens, options)
        measured = Likelihoods(model, make(), batch_size) if likelihoods else None
    elif not callable(model) or isinstance(model, type):
        raise ArgumentError(f"model: expected something with generate, or a function, got {type(model).__name__}")
    elif not likelihoods:
        measured = None
    elif hasattr(model, "llm") and hasattr(model, "collator"):
        measured = Likelihoods(model.llm, model.collator, batch_size)
    else:
        found = getattr(model, "__qualname__", type(model).__name__)
        raise ArgumentError(f"model: expected a LayAlign model or llm_alone(...) for {likelihoods[0]}, got {found}")
    settings = {
        "task": task,
        "stage": kind.stage,
        "max_new_tokens": kind.max_new_tokens,
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
    generates = not asked or bool(set(asked) & set(METRICS))
    result = EvaluationResult(task, {}, report, Path(output_dir))
    with (
        processes.all_held(output_dir),
        evaluation_mode(model),
        torch.no_grad(),
        _bar(progress and processes.main, len(examples) * (generates + len(likelihoods))) as advance,
    ):
        store = processes.all_get(lambda: OutputStore(Path(output_dir), settings, resume))
        translations: dict[str, _Translated] = {}
        for language, group in groups.items():
            done = processes.all_get(functools.partial(store.begin, language, group))
            outputs: list[str | None] = [None] * len(group)
            if generates:
                keep_failed = non_finite == "fail"
                outputs = _outputs(answer, store, done, language, group, batch_size, advance, processes, keep_failed)
            for name in likelihoods:
                _measure(name, measured, store, language, group, advance, processes)
            if kind.scorer == "translation":
                translations[language] = processes.all_get(
                    functools.partial(_translated, store, language, group, outputs, asked)
                )
                result.failed += generates * outputs.count(None)
            else:
                result.scores[language], result.outcomes[language] = processes.all_get(
                    functools.partial(_score, store, language, group, outputs, kind, label_match)
                )
        result.scoring = {"scorer": kind.scorer, "label_match": label_match}
        if kind.scorer == "translation":
            result.scoring = {"scorer": kind.scorer, **next(iter(translations.values())).signatures}
            result.measures = {
                name: Sentences(
                    name,
                    {language: found.statistics[name] for language, found in translations.items()},
                    {language: found.ids[name] for language, found in translations.items()},
                ).scores(task)
                for name in asked
            }
        result.cut = processes.all_get(store.count_cut)
        processes.all_get(lambda: _write(result, store.folder))
    if processes.main and any(result.cut.values()):
        said = ", ".join(f"{count} of {what}" for what, count in result.cut.items() if count)
        logger.warning("cut, of %d questions: %s", len(examples), said)
    return result


def _asked(kind: Task, measures: Any) -> tuple[str, ...]:
    """What is measured beside right answers: of translation the measures, of labels their likelihoods."""
    if kind.scorer == "translation":
        names = check_measures(measures)
        for name in names:
            if name in METRICS:
                metric_of(name)  # raises now where sacrebleu is missing
        return names
    if measures is not None:
        refuse("measures", f"none for the scorer {kind.scorer}", measures)
    return (LABELS,) if kind.scorer in LIKELIHOODS else ()


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
    done: Mapping[int, str | None],
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
    done = {i: text for i, text in done.items() if keep_failed or text is not None}
    advance(language, len(done))
    # The longest first: a batch that does not fit into memory fails at once.
    rest = sorted(
        (i for i in range(len(examples)) if i not in done),
        key=lambda i: (-len(examples[i].source) - len(examples[i].prompt), i),
    )

    def work(own: Sequence[int]) -> dict[int, tuple[str | None, Sequence[str]]]:
        texts = list(answer([examples[i] for i in own]))
        if len(texts) != len(own) or not all(isinstance(text, str | None) for text in texts):
            raise ArgumentError(f"model: expected {len(own)} texts, one per example, got {len(texts)}")
        # Half of a surrogate pair cannot stand in a file.
        texts = [text and text.encode("utf-8", errors="replace").decode("utf-8") for text in texts]
        # Whoever answers may say what was cut.
        cut = dict(zip(own, getattr(answer, "last_cut", ()), strict=False))
        return {i: (text, cut.get(i, ())) for i, text in zip(own, texts, strict=True)}

    batches = [rest[start : start + batch_size] for start in range(0, len(rest), batch_size)]
    for gathered in _in_rounds(batches, work, processes):
        failed = [] if keep_failed else sorted(i for i, (text, _) in gathered.items() if text is None)
        gathered = {i: answered for i, answered in gathered.items() if i not in failed}
        new = {i: text for i, (text, _) in gathered.items()}
        processes.all_get(
            functools.partial(store.append, language, new, {i: kinds for i, (_, kinds) in gathered.items()})
        )
        done.update(new)
        advance(language, len(new))
        if failed:
            _refuse_failed(language, examples, failed, "; non_finite='fail' counts such answers as wrong")
    return [done[i] for i in range(len(examples))]


def _measure(
    name: str,
    likelihoods: Likelihoods | None,
    store: OutputStore,
    language: str,
    examples: Sequence[Example],
    advance: Callable[[str, int], None],
    processes: Processes,
) -> None:
    """See to it that the store has what is measured of every example by likelihood."""
    assert likelihoods is not None
    done = processes.all_get(lambda: set(store.values[language].get(name, {})))
    advance(language, len(done))
    units = likelihoods.units(name, examples, done)
    for gathered in _in_rounds(units, functools.partial(likelihoods, name, examples), processes):
        good = {i: values for i, values in gathered.items() if all(map(isfinite, values))}
        processes.all_get(functools.partial(store.append_values, language, name, good))
        advance(language, len(good))
        if len(good) < len(gathered):
            _refuse_failed(language, examples, sorted(set(gathered) - set(good)), "")


def _in_rounds(
    units: Sequence[Sequence[int]], work: Callable[[Sequence[int]], dict[int, Any]], processes: Processes
) -> Iterator[dict[int, Any]]:
    """What `work` gives for the units of each round; every process works on one of them."""
    for together in processes.deal(units):
        # Without one of its own a process works on the first one too: the weights may be spread over all of them.
        found = processes.all_gather(work(together[processes.rank if processes.rank < len(together) else 0]))
        yield {i: value for part in found[: len(together)] for i, value in part.items()}


def _refuse_failed(language: str, examples: Sequence[Example], failed: Sequence[int], hint: str) -> None:
    example, others = examples[failed[0]], f" and {len(failed) - 1} more" if failed[1:] else ""
    raise NonFiniteError(
        f"model: expected finite logits, got NaN or infinity for {language} example {failed[0] + 1} of "
        f"{len(examples)} (id {example.id!r}, {shown(example.source)}){others}{hint}"
    )


def _score(
    store: OutputStore,
    language: str,
    examples: Sequence[Example],
    outputs: Sequence[str | None],
    kind: Task,
    match: str,
) -> tuple[LanguageScore, Outcomes]:
    """Judge the outputs of a language, or its labels' likelihoods, and write its predictions."""
    predictions, outcomes = [], []
    by_likelihood, ties = kind.scorer in LIKELIHOODS, 0
    for number, (example, output) in enumerate(zip(examples, outputs, strict=True)):
        entry: dict[str, Any] = {"id": example.id, "question": example.source, "prompt": example.prompt}
        if by_likelihood:
            values, labels = store.values[language][LABELS][number], example.choices
            pairs = [(value, int(count)) for value, count in zip(values, values[len(labels) :], strict=False)]
            gold, parsed = example.target, best_label(pairs, labels, mean=kind.scorer == LIKELIHOODS[1])
            right, ties = parsed == gold, ties + (parsed is None)
            entry.update(gold=gold, parsed=parsed, correct=right)
            entry["log_probs"] = {label: list(pair) for label, pair in zip(labels, pairs, strict=True)}
        else:
            gold, parsed, right = judge(example, output, kind, match)
            # JSON has no infinity, which an endless row of digits reads as.
            entry.update(gold=gold if gold != inf else str(gold), output=output)
            entry.update(parsed=parsed if parsed not in (inf, -inf) else str(parsed), correct=right)
        outcomes.append((example.id, right))
        if kinds := store.cut[language].get(number):
            entry["cut"] = kinds
        predictions.append(entry)
    _write_predictions(store, language, predictions)
    if ties:
        logger.warning(
            "%s: %d of %d questions have two best labels; none is their answer", language, ties, len(examples)
        )
    correct, count = sum(right for _, right in outcomes), len(examples)
    low, high = wilson_interval(correct, count)
    failed = 0 if by_likelihood else sum(output is None for output in outputs)
    return LanguageScore(language, correct, count, 100 * correct / count, 100 * low, 100 * high, failed), outcomes


@dataclass
class _Translated:
    """Of one language, by measure: the sentences' statistics, an array (n, k), and their ids; and signatures."""

    statistics: dict[str, Any]
    ids: dict[str, list[str]]
    signatures: dict[str, str]


def _translated(
    store: OutputStore,
    language: str,
    examples: Sequence[Example],
    outputs: Sequence[str | None],
    measures: Sequence[str],
) -> _Translated:
    """Score the translations of a language by each measure, and write its predictions."""
    entries: list[dict[str, Any]] = [
        {"id": example.id, "question": example.source, "prompt": example.prompt, "gold": example.target}
        for example in examples
    ]
    found, values = _Translated({}, {}, {}), store.values[language]
    metrics = [name for name in measures if name in METRICS]
    if metrics:
        scores = translation_scores([text or "" for text in outputs], [e.target for e in examples], metrics)
        found.signatures = scores["signatures"]
        found.statistics.update(scores["statistics"])
        for number, (entry, output) in enumerate(zip(entries, outputs, strict=True)):
            entry["output"] = output
            if kinds := store.cut[language].get(number):
                entry["cut"] = kinds
    for name in measures:
        size = group_size(name)
        if size is not None:
            rights = []
            for start in range(0, len(examples) - size + 1, size):
                table = [values[name][i] for i in range(start, start + size)]
                rights += right_ones(table, [example.target for example in examples[start : start + size]])
            found.statistics[name] = [[int(right), 1] for right in rights]
        elif name not in METRICS:
            found.statistics[name] = [[-values[name][i][0], values[name][i][1]] for i in range(len(examples))]
        rows = found.statistics[name]
        found.ids[name] = [example.id for example in examples[: len(rows)]]
        for entry, row in zip(entries, rows, strict=False):
            # BLEU says little of one sentence; its text is there.
            if name != "bleu":
                said = round(score_of(name, row), 4) if name == "chrf" else bool(row[0]) if size else list(row)
                entry.setdefault("measures", {})[name] = said
    _write_predictions(store, language, entries)
    return found


def _write_predictions(store: OutputStore, language: str, entries: Sequence[Mapping[str, Any]]) -> None:
    text = json.dumps(entries, indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(store.path_of(language, ".json"), text + "\n")


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
