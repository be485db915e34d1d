"""Tasks: how their data is read, how an answer is judged, and how long it may be. `register_task` adds one."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from layalign.data.collator import STAGES
from layalign.data.examples import Example, ReadReport
from layalign.data.languages import find_language, language_of
from layalign.data.readers import Spec, by_language, load_examples
from layalign.data.records import FORMATS, PROMPTS, fill_prompt
from layalign.evaluation.scoring import LIKELIHOODS, Scorer, check_labels, check_number, check_scorer, is_function
from layalign.utils.errors import ArgumentError, DataError, LayAlignError, first_line, one_of, refuse, whole_number

Reader = Callable[[Any], Iterable[Example]]


@dataclass(frozen=True)
class Task:
    """What `evaluate` must know of a task.

    Attributes:
        reader: a format of `layalign.data.FORMATS`; or a function that gets the `data` of `evaluate` (a path, or
            whatever it was given) and returns the `Example`s. A function is not called where `data` is examples.
        scorer: one of `SCORERS`; or a function (example, answer) -> bool, whether the answer is right. An answer that
            failed is wrong, and the function is not asked.
        max_new_tokens: longest answer, in tokens.
        stage: "task" gives the LLM the prompt, "translation" only the encoder's tokens.
        prompt: of examples that bring none: "math", "source", "none", or a template with "{source}". None is the
            format's own. Formats with choices have a fixed prompt and take none.

    Raises:
        ArgumentError: a field is none of these.
    """

    reader: str | Reader
    scorer: str | Scorer
    max_new_tokens: int
    stage: str = "task"
    prompt: str | None = None

    def __post_init__(self) -> None:
        if not is_function(self.reader):
            one_of("reader", self.reader, FORMATS)
        check_scorer(self.scorer)
        whole_number("max_new_tokens", self.max_new_tokens, least=1)
        one_of("stage", self.stage, STAGES)
        if self.prompt is None:
            return
        if not isinstance(self.prompt, str) or (self.prompt not in PROMPTS and "{source}" not in self.prompt):
            refuse("prompt", f"one of {', '.join(PROMPTS)}, or a template with '{{source}}'", self.prompt)
        if isinstance(self.reader, str) and not FORMATS[self.reader].two_sided:
            refuse("prompt", f"None, for the format {self.reader} has a prompt of its own", self.prompt)


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
OWN = tuple(TASKS)  # the library's
_FILES: dict[Path, tuple[bytes, str, Task]] = {}  # the files that were run: content, and the task each registered


def register_task(name: str, task: Task) -> None:
    """Make a task known to `evaluate` and to `layalign evaluate`.

    Args:
        name: what `task=` and `--task` call it.
        task: its reader, its scorer, and the rest.

    Raises:
        ArgumentError: the name is taken, or holds something other than letters, digits, "-" and "_"; `task` is no
            `Task`.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
        refuse("name", "letters, digits, '-' and '_'", name)
    if name in TASKS:
        why = "it is the library's" if name in OWN else "unregister_task removes one's own"
        raise ArgumentError(f"name: expected one that no task has, got {name!r}; {why}")
    if not isinstance(task, Task):
        refuse("task", "a layalign.evaluation.Task", task)
    TASKS[name] = task


def unregister_task(name: str) -> None:
    """Remove a task that `register_task` added.

    Raises:
        ArgumentError: there is none of that name, or it is the library's own.
    """
    if not isinstance(name, str) or name not in TASKS or name in OWN:
        refuse("name", "that of a task of register_task", name)
    del TASKS[name]


def find_task(task: str | Path) -> tuple[str, Task]:
    """(name, task) of one of `TASKS`, or of the task that a Python file registers.

    Args:
        task: a name; or the path of a file, which ends in ".py". The file is run, once for each content it has.

    Raises:
        ArgumentError: there is no such task or file; the file raises, or registers another number of tasks than one.
    """
    if isinstance(task, str | Path) and str(task).endswith(".py"):
        task = _run_file(Path(task))
    if not isinstance(task, str) or task not in TASKS:
        refuse("task", f"one of {', '.join(TASKS)}, or a Python file that registers one", task)
    return task, TASKS[task]


def _run_file(path: Path) -> str:
    """Run a task file; the name of the task that it registers. What it registered before goes."""
    try:
        path, content = path.resolve(), path.read_bytes()
    except (OSError, ValueError):
        refuse("task", "a Python file that registers a task", str(path))
    if path in _FILES:
        before, name, own = _FILES[path]
        if TASKS.get(name) is own:
            if before == content:
                return name
            del TASKS[name]
    module = ModuleType(f"layalign_task_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and pickle look it up there
    there = set(TASKS)
    try:
        exec(compile(content, str(path), "exec", dont_inherit=True), module.__dict__)
        new = [name for name in TASKS if name not in there]
        if len(new) != 1:
            raise ArgumentError(f"expected one register_task, got {len(new)}")
    except Exception as error:
        for name in TASKS.keys() - there:
            del TASKS[name]
        what = "" if isinstance(error, LayAlignError) else f"{type(error).__name__}: "
        raise ArgumentError(f"task: {path} cannot be used: {what}{first_line(error)}") from error
    _FILES[path] = content, new[0], TASKS[new[0]]
    return new[0]


def read_examples(
    name: str,
    task: Task,
    data: Spec | Sequence[Example],
    languages: Sequence[str] | None,
    limit: int | None,
    skip_bad: bool,
) -> tuple[list[Example], ReadReport]:
    """The examples of a task, checked for what would be scored wrongly, and what was read.

    Args:
        name: of the task.
        task: it, with the scorer and the stage that are asked for.
        data: what to read, or examples.
        languages, limit, skip_bad: as in `EvalConfig`.

    Raises:
        ArgumentError: the reader or an example cannot be used, or a language is not there.
        DataError: no data, or a malformed line.
    """
    given = isinstance(data, Sequence) and not isinstance(data, str) and data and isinstance(data[0], Example)
    if not given and isinstance(task.reader, str):
        examples, report = load_examples(
            data,  # type: ignore[arg-type]
            format=task.reader, languages=languages, limit=limit, skip_bad=skip_bad, split="test", prompt=task.prompt,
        )  # fmt: skip
    else:
        if not given and skip_bad:
            refuse("skip_bad", f"False, for the task {name} has a reader of its own", skip_bad)
        found = data if given else _own_examples(name, task, data)
        groups = by_language(found)  # type: ignore[arg-type]
        if languages is not None:
            wanted = [language_of(language).name for language in languages]
            missing = [language for language in wanted if language not in groups]
            if missing:
                raise ArgumentError(f"languages: expected some of {', '.join(groups)}, got {missing[0]}")
            groups = {language: groups[language] for language in wanted}
        examples = [_prompted(example, task) for group in groups.values() for example in group[:limit]]
        report = ReadReport(counts=Counter(example.language for example in examples))
    for example in examples:
        if task.scorer in LIKELIHOODS or (name not in OWN and task.scorer == "label"):
            check_labels(example)
        if name not in OWN and task.scorer in ("number", "signed-number"):
            check_number(example, task.scorer == "signed-number")
    return examples, report


def _own_examples(name: str, task: Task, data: Any) -> list[Example]:
    """What a task's own reader gives, with the languages by their English names."""
    where = f"task: the reader of {name}"
    try:
        examples = list(task.reader(data))  # type: ignore[operator]
    except LayAlignError:
        raise
    except Exception as error:
        raise DataError(f"{where} raised {type(error).__name__}: {first_line(error)}") from error
    if not examples:
        raise DataError(f"{where}: expected examples, got none")
    seen: set[tuple[str, str]] = set()
    for number, example in enumerate(examples):
        which = f"{where}: example {number + 1}"
        if not isinstance(example, Example):
            refuse(which, "an Example", example)
        for part in ("source", "target", "language", "prompt", "id"):
            text = getattr(example, part)
            if not isinstance(text, str) or (part not in ("prompt", "id") and not text.strip()):
                refuse(f"{which}, its {part}", "text" if part in ("prompt", "id") else "a text that is not empty", text)
        if not isinstance(example.choices, tuple):
            refuse(f"{which}, its choices", "a tuple of texts", example.choices)
        known = find_language(example.language)
        example = examples[number] = _prompted(replace(example, language=known.name) if known else example, task)
        if not example.prompt and task.stage == "task" and task.prompt is None:
            raise ArgumentError(f"{which}: expected a prompt for the stage 'task', from the reader or Task(prompt=...)")
        if example.id and (example.language, example.id) in seen:
            refuse(f"{which}, its id", f"another one for each {example.language} example", example.id)
        seen.add((example.language, example.id))
    return examples


def _prompted(example: Example, task: Task) -> Example:
    """The example with the task's prompt, where it brings none."""
    if example.prompt or not task.prompt:
        return example
    return replace(example, prompt=fill_prompt(task.prompt, example.source))
