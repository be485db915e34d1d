"""Tasks: which files they read, how an answer is judged, and how long it may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from layalign.data.collator import STAGES
from layalign.data.examples import Example
from layalign.data.numbers import find_number
from layalign.evaluation.metrics import last_number, parse_label, same_number
from layalign.utils.errors import one_of, refuse

LIKELIHOODS = ("label-likelihood", "label-likelihood-mean")  # scorers that choose a label and generate nothing
SCORERS = ("number", "signed-number", "label", *LIKELIHOODS, "text", "translation")
NUMERIC = ("mgsm", "msvamp")  # formats whose targets are numbers


@dataclass(frozen=True)
class Task:
    """What is special about a task.

    Attributes:
        format: of its files, one of `layalign.data.FORMATS`.
        scorer: one of `SCORERS`.
        max_new_tokens: longest answer.
        stage: "task" gives the LLM the prompt, "translation" only the encoder's tokens.
    """

    format: str
    scorer: str
    max_new_tokens: int
    stage: str = "task"


TASKS = {
    "mgsm": Task("mgsm", "number", 512),
    "msvamp": Task("msvamp", "number", 512),
    "math": Task("math", "number", 512),
    "xnli": Task("xnli", "label", 16),
    "x-csqa": Task("x-csqa", "label", 16),
    "xcopa": Task("xcopa", "label", 16),
    "translation": Task("pairs", "translation", 256, "translation"),
    "jsonl": Task("jsonl", "text", 256),
    "tsv": Task("tsv", "text", 256),
}


def task_of(name: str, scorer: str | None = None, stage: str | None = None, max_new_tokens: int | None = None) -> Task:
    """One of `TASKS`, with other settings where some are given.

    Raises:
        ArgumentError: there is no such task, scorer or stage.
    """
    one_of("task", name, TASKS)
    own = TASKS[name]
    kind = Task(
        own.format,
        own.scorer if scorer is None else scorer,
        own.max_new_tokens if max_new_tokens is None else max_new_tokens,
        own.stage if stage is None else stage,
    )
    one_of("scorer", kind.scorer, SCORERS)
    one_of("stage", kind.stage, STAGES)
    return kind


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


def judge(example: Example, output: str | None, kind: Task, label_match: str) -> tuple[Any, Any, bool]:
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


def _number(text: str, signed: bool, language: str | None) -> float | None:
    """The number that a text says; as published, one without digits says 0, but an empty one says nothing."""
    if not signed:
        return last_number(text) if text.strip() else None
    found = find_number(text, language)
    return None if found is None else float(found)
