"""The task stage: XNLI, trained on English only, with or without the translation stage before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layalign.data import Example
from layalign.data.readers import load_examples
from layalign.evaluation.answering import llm_alone
from layalign.evaluation.likelihood import best_label, choice_log_probs
from layalign.experiments.engine import RESULT, run_folder
from layalign.experiments.real.data import RealData
from layalign.experiments.real.measures import BATCH, collators
from layalign.experiments.real.runs import (
    Stage,
    after,
    load_llm_alone,
    load_run,
    named,
    token_counts,
    tokenizers_of,
    train_config,
    trained_folder,
    translation,
)
from layalign.experiments.real.settings import RealSettings, RealSystem, TaskSettings
from layalign.experiments.settings import digest
from layalign.utils.errors import ArgumentError

SUFFIX = "-task"


@dataclass(frozen=True)
class TaskData:
    """Premises and hypotheses.

    Attributes:
        train, dev: English examples.
        test: examples by the name of their language.
        mark: a fingerprint of all of them.
    """

    train: list[Example]
    dev: list[Example]
    test: dict[str, list[Example]]
    mark: str


def read_task(settings: RealSettings) -> TaskData:
    """Read ``xnli/dev/en.tsv`` for training and ``xnli/test/*.tsv``: premise, hypothesis, label.

    Raises:
        ArgumentError: a file is missing or too short.
        DataError: a malformed line.
    """
    task, root = settings_of(settings), Path(settings.data) / "xnli"
    english, files = root / "dev" / "en.tsv", sorted((root / "test").glob("*.tsv"))
    if not english.is_file() or not files:
        raise ArgumentError(f"data: expected {english} and {root / 'test'}/*.tsv, which do not exist")
    examples = _read(english)
    if len(examples) < task.train + task.dev:
        raise ArgumentError(f"data: expected {task.train + task.dev} lines in {english}, got {len(examples)}")
    test = {}
    for file in files:
        group = _read(file)[: task.test_per_language]
        test[group[0].language] = group
    held_out = {example.source for group in test.values() for example in group}
    train = [example for example in examples[: task.train] if example.source not in held_out]
    dev = examples[task.train : task.train + task.dev]
    texts = [[each.source, each.target] for group in (train, dev, *test.values()) for each in group]
    return TaskData(train, dev, test, digest(texts))


def _read(file: Path) -> list[Example]:
    return load_examples({"format": "xnli", "path": str(file), "language": file.stem})[0]


def settings_of(settings: RealSettings) -> TaskSettings:
    """The settings of the task stage; raises ArgumentError if there are none."""
    if settings.task is None:
        raise ArgumentError("task: expected the settings of a task stage, got none")
    return settings.task


def _read_by(system: RealSystem, examples: Sequence[Example]) -> list[Example]:
    """The examples as a system reads them: without an encoder, only the prompt."""
    if not system.reads_text:
        return list(examples)
    return [Example("", e.target, e.language, e.prompt, e.id, e.choices) for e in examples]


def stage(settings: RealSettings, system: RealSystem, data: RealData, text: TaskData, folder: Path) -> Stage:
    """The task stage of a system. Its `start` trains the translation stage before it, if necessary.

    Args:
        settings: settings of the experiment.
        system: the system of the task stage.
        data, text: data of the translation stage and of the task stage.
        folder: folder of the experiment.
    """
    task = settings_of(settings)
    before = None if system.after is None else translation(settings, settings.system(system.after), data)

    def start(seed: int) -> dict[str, Any]:
        if before is None:
            return {}
        tokenizers = dict(zip(("encoder_tokenizer", "llm_tokenizer"), tokenizers_of(settings), strict=True))
        checkpoint = trained_folder(before, folder, seed)
        # The only field in which a system may differ from the checkpoint that it starts from.
        changes = {key: value for key, value in system.model_settings.items() if key == "use_prompt"}
        return {"model": load_run(checkpoint, settings.dtype_of(system), **changes), **tokenizers}

    values = {key: value for key, value in asdict(task).items() if key not in ("systems", "seeds")}
    own: dict[str, Any] = {
        "steps": system.steps(task),
        "after": before and before.mark,
        "reads_text": system.reads_text,
        **system.model_settings,
    }
    if system.learning_rates is not None:
        own["learning_rates"] = system.learning_rates
    return Stage(
        SUFFIX, system, task, _read_by(system, text.train), _read_by(system, text.dev),
        token_counts(settings, text.train, task.max_length),
        lambda *run: train_config(
            settings, task, system, *run, stage="task", task="xnli", max_target_length=16,
            max_prompt_length=task.max_length,
        ),
        settings.dtype_of(system), start, digest([values, own, text.mark]),
    )  # fmt: skip


def task_run(
    settings: RealSettings, system: RealSystem, data: RealData, text: TaskData, folder: Path, seed: int
) -> dict[str, Any]:
    """Train a system on the task and predict the labels of the test sentences by their likelihood.

    Returns:
        Under "xnli", by language, lists with an entry per sentence: "label", the most likely one (None for a tie), and
        "right".
    """
    own = stage(settings, system, data, text, folder)

    def tested(checkpoint: Path | None) -> dict[str, Any]:
        if checkpoint is None:
            model = load_llm_alone(settings, system)
            collator = llm_alone(model, tokenizers_of(settings)[1]).collator
        else:
            model = load_run(checkpoint)
            collator = collators(model, tokenizers_of(settings), "task", 512)[0]
        found: dict[str, Any] = {}
        for language, examples in text.test.items():
            read = _read_by(system, examples)
            values = choice_log_probs(model, collator, read, [list(e.choices) for e in read], batch_size=BATCH)
            labels = [best_label(row, e.choices) for row, e in zip(values, read, strict=True)]
            found[language] = {"label": labels, "right": [a == e.target for a, e in zip(labels, read, strict=True)]}
        return {"xnli": found}

    path = run_folder(folder, system.name, seed) / named(RESULT, SUFFIX)
    return after(lambda: own, folder, seed, system, path, own.mark, f"test{SUFFIX}", tested, indent=None)
