"""Scoring: which answers are right, how good translations are, and each language's predictions."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layalign.data.examples import Example
from layalign.data.numbers import find_number
from layalign.evaluation.levels import Outcomes
from layalign.evaluation.likelihood import LABELS, best_label, right_ones
from layalign.evaluation.measures import Sentences, group_size
from layalign.evaluation.metrics import last_number, parse_label, same_number, wilson_interval
from layalign.evaluation.result import LanguageScore
from layalign.evaluation.store import OutputStore, prediction_path
from layalign.evaluation.translation import METRICS, score_of, translation_scores
from layalign.utils.errors import ArgumentError, first_line, one_of, refuse, shown
from layalign.utils.files import write_whole

if TYPE_CHECKING:
    from layalign.evaluation.tasks import Task

logger = logging.getLogger(__name__)

LIKELIHOODS = ("label-likelihood", "label-likelihood-mean")  # scorers that choose a label and generate nothing
SCORERS = ("number", "signed-number", "label", *LIKELIHOODS, "text", "translation")
NUMERIC = ("mgsm", "msvamp")  # formats whose targets are numbers

Scorer = Callable[[Example, str], bool]


def is_function(value: Any) -> bool:
    """Whether it can be called and is no class."""
    return callable(value) and not isinstance(value, type)


def check_scorer(scorer: Any) -> None:
    """It is one of `SCORERS`, or a function of an example and an answer.

    Raises:
        ArgumentError: it is neither.
    """
    if not is_function(scorer):
        one_of("scorer", scorer, SCORERS)
        return
    try:
        inspect.signature(scorer).bind(None, None)
    except TypeError:
        refuse("scorer", "a function that takes an example and an answer", scorer)
    except ValueError:  # some functions of C tell nothing of their arguments
        pass


def scorer_name(scorer: str | Scorer) -> str:
    """What tells a scorer from others, so that runs scored otherwise do not compare.

    Of a function: its name, and a hash of its settings and of the file that defines it.
    """
    if isinstance(scorer, str):
        return scorer
    function: Any = scorer
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    settings = re.sub(r" at 0x[0-9a-f]+", "", repr((scorer, getattr(function, "__defaults__", None), cells)))
    try:
        source = Path(inspect.getsourcefile(function if hasattr(function, "__code__") else type(function)) or "")
        digest = hashlib.sha256(source.read_bytes())
    except (OSError, TypeError):  # typed at a prompt, or in C
        digest = hashlib.sha256(getattr(getattr(function, "__code__", None), "co_code", b""))
    digest.update(settings.encode("utf-8", errors="backslashreplace"))
    return f"{getattr(function, '__qualname__', type(function).__qualname__)} {digest.hexdigest()[:16]}"


def check_labels(example: Example) -> None:
    """The example has labels to choose from, among them the right one.

    Raises:
        ArgumentError: it has not.
    """
    labels = example.choices
    where = f"data: the {example.language} example {example.id!r}"
    if (
        len(labels) < 2
        or len(set(labels)) < len(labels)
        or not all(isinstance(label, str) and label.strip() for label in labels)
    ):
        refuse(where, "several different labels, none of them empty", labels)
    if example.target not in labels:
        refuse(where, f"the right label among {', '.join(labels)}", example.target)


def check_number(example: Example, signed: bool) -> None:
    """The target has a number; without one it would read as 0, as an answer without one does."""
    if find_number(example.target, example.language) is None if signed else not re.search(r"\d", example.target):
        refuse(f"data: the {example.language} example {example.id!r}", "a target with a number", example.target)


def judge(example: Example, output: str | None, task: Task, label_match: str) -> tuple[Any, Any, bool]:
    """(gold, what the output says, whether they agree); None says nothing, and agrees with nothing.

    For a scorer that is a function it is whether they are equal; `score` asks the function.
    """
    if task.scorer in ("number", "signed-number"):
        signed = task.scorer == "signed-number"
        # The readers of the math test sets give plain digits already.
        gold = _number(example.target, signed, None if task.reader in NUMERIC else example.language)
        parsed = _number(output or "", signed, example.language)
        return gold, parsed, same_number(parsed, gold)
    if output is None:
        return example.target, None, False
    if task.scorer == "label":
        label = parse_label(output, example.choices or (example.target,), label_match)
        return example.target, label, label == example.target
    return example.target, output.strip(), output.strip() == example.target.strip()


def _number(text: str, signed: bool, language: str | None) -> float | None:
    """The number that a text says; as published, one without digits says 0, but an empty one says nothing."""
    if not signed:
        return last_number(text) if text.strip() else None
    found = find_number(text, language)
    return None if found is None else float(found)


def scoring_of(task: Task, label_match: str) -> dict[str, str]:
    """What tells one way of judging from others, for `scores.json`."""
    return {"scorer": scorer_name(task.scorer), "label_match": label_match}


def score(
    name: str,
    task: Task,
    label_match: str,
    store: OutputStore,
    language: str,
    examples: Sequence[Example],
    outputs: Sequence[str | None],
) -> tuple[LanguageScore, Outcomes]:
    """Judge the outputs of a language, or its labels' likelihoods, and write its predictions."""
    predictions, outcomes = [], []
    by_likelihood, ties = task.scorer in LIKELIHOODS, 0
    for number, (example, output) in enumerate(zip(examples, outputs, strict=True)):
        entry: dict[str, Any] = {"id": example.id, "question": example.source, "prompt": example.prompt}
        if by_likelihood:
            values, labels = store.values[language][LABELS][number], example.choices
            pairs = [(value, int(count)) for value, count in zip(values, values[len(labels) :], strict=False)]
            gold, parsed = example.target, best_label(pairs, labels, mean=task.scorer == LIKELIHOODS[1])
            right, ties = parsed == gold, ties + (parsed is None)
            entry.update(gold=gold, parsed=parsed, correct=right)
            entry["log_probs"] = {label: list(pair) for label, pair in zip(labels, pairs, strict=True)}
        else:
            gold, parsed, right = judge(example, output, task, label_match)
            if not isinstance(task.scorer, str) and output is not None:
                right = _verdict(name, task.scorer, example, output, store.folder)
            # JSON has no infinity, which an endless row of digits reads as.
            entry.update(gold=gold if gold != inf else str(gold), output=output)
            entry.update(parsed=parsed if parsed not in (inf, -inf) else str(parsed), correct=right)
        outcomes.append((example.id, right))
        if kinds := store.cut[language].get(number):
            entry["cut"] = kinds
        predictions.append(entry)
    _write_predictions(store, language, predictions)
    store.scored(language, scoring_of(task, label_match))
    if ties:
        logger.warning(
            "%s: %d of %d questions have two best labels; none is their answer", language, ties, len(examples)
        )
    correct, count = sum(right for _, right in outcomes), len(examples)
    low, high = wilson_interval(correct, count)
    failed = 0 if by_likelihood else sum(output is None for output in outputs)
    return LanguageScore(language, correct, count, 100 * correct / count, 100 * low, 100 * high, failed), outcomes


def _verdict(name: str, scorer: Scorer, example: Example, output: str, folder: Path) -> bool:
    """What a task's own scorer says of an answer."""
    where = f"for the {example.language} example {example.id!r}"
    kept = f"the answers are kept in {folder}, and a rerun scores them without asking again"
    try:
        right = scorer(example, output)
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise ArgumentError(f"task: the scorer of {name} raised {what}, {where}; {kept}") from error
    if not isinstance(right, bool):
        raise ArgumentError(f"task: the scorer of {name}: expected True or False {where}, got {shown(right)}; {kept}")
    return right


@dataclass
class Translated:
    """Of one language, by measure: the sentences' statistics, an array (n, k), and their ids; and signatures."""

    statistics: dict[str, Any]
    ids: dict[str, list[str]]
    signatures: dict[str, str]


def score_translations(
    store: OutputStore,
    language: str,
    examples: Sequence[Example],
    outputs: Sequence[str | None],
    measures: Sequence[str],
) -> Translated:
    """Score the translations of a language by each measure, and write its predictions."""
    entries: list[dict[str, Any]] = [
        {"id": example.id, "question": example.source, "prompt": example.prompt, "gold": example.target}
        for example in examples
    ]
    found, values = Translated({}, {}, {}), store.values[language]
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


def sentences_of(translations: Mapping[str, Translated], measure: str) -> Sentences:
    """The statistics of all languages for one measure."""
    return Sentences(
        measure,
        {language: found.statistics[measure] for language, found in translations.items()},
        {language: found.ids[measure] for language, found in translations.items()},
    )


def _write_predictions(store: OutputStore, language: str, entries: Sequence[Mapping[str, Any]]) -> None:
    text = json.dumps(entries, indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(prediction_path(store.folder, language, ".json"), text + "\n")
