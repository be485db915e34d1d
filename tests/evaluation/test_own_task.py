"""Tasks from outside: by registering, and from a file; tasks of the library's own in two files; EvalConfig."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_text import byte_tokenizer, write_lines
from tiny import tiny_encoder, tiny_llm

from layalign import LayAlignForCausalLM
from layalign.cli import main
from layalign.data import Example, records
from layalign.data.prompts import math_prompt
from layalign.evaluation import (
    TASKS,
    EvalConfig,
    Task,
    compare_runs,
    evaluate,
    register_task,
    tasks,
    unregister_task,
)
from layalign.evaluation.scoring import scorer_name
from layalign.modeling.tokenization import save_tokenizers
from layalign.utils.errors import ArgumentError, DataError

DOCS = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
SECTION = DOCS.partition("## Your own task\n")[2].partition("\n## ")[0]
EXAMPLE, CONFIG = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
ENCODER, TEXT = byte_tokenizer(eos=True), byte_tokenizer()


@pytest.fixture(autouse=True)
def _own_tasks_end_with_the_test() -> Iterator[None]:
    there = dict(TASKS)
    yield
    TASKS.clear()
    TASKS.update(there)


class Asked:
    """Answers by a rule, and counts the questions."""

    def __init__(self, rule: Callable[[Example], str]) -> None:
        self.rule, self.prompts = rule, []

    def __call__(self, examples: list[Example]) -> list[str]:
        self.prompts += [example.prompt for example in examples]
        return [self.rule(example) for example in examples]


def run(model: Any, task: Any, data: Any, out: Path, **options: Any) -> Any:
    return evaluate(model, None, None, task, data, out, model_name="test", **options)


def questions(folder: Path) -> Path:
    write_lines(folder / "sw.tsv", "Moja?\tyes", "Mbili.\tno", "Tatu?\tyes")
    write_lines(folder / "th.tsv", "หนึ่ง\tno")
    return folder


def yes(example: Example) -> str:
    return " Yes, it is."


# By registering


def test_a_task_by_registering(tmp_path: Path) -> None:
    register_task("doubled", Task("tsv", lambda example, answer: answer == 2 * example.target, 9, prompt="{source}!"))
    write_lines(tmp_path / "data/sw.tsv", "a\tx", "b\ty")
    asked = Asked(lambda example: "xx")
    result = run(asked, "doubled", tmp_path / "data", tmp_path / "out")
    assert (result.scores["Swahili"].correct, result.scores["Swahili"].count) == (1, 2)
    assert sorted(asked.prompts) == ["a!", "b!"]
    predictions = json.loads((tmp_path / "out/predictions/Swahili.json").read_text())
    assert [(p["gold"], p["parsed"], p["correct"]) for p in predictions] == [("x", "xx", True), ("y", "xx", False)]
    settings = json.loads((tmp_path / "out/settings.json").read_text())["settings"]
    assert (settings["task"], settings["max_new_tokens"], settings["stage"]) == ("doubled", 9, "task")
    unregister_task("doubled")
    with pytest.raises(ArgumentError, match="task: expected one of mgsm, .*, tsv, or a Python file .*, got 'doubled'"):
        run(asked, "doubled", tmp_path / "data", tmp_path / "out")
    register_task("doubled", Task("tsv", "text", 9))
    with pytest.raises(ArgumentError, match="task: expected one of mgsm, .*, doubled, or a Python file"):
        run(asked, "tripled", tmp_path / "data", tmp_path / "out")


def test_examples_and_readers_of_ones_own_are_asked_alike(tmp_path: Path) -> None:
    """Languages get their English names; data that are examples are taken as they are, the reader is not called."""
    own = [Example("a", "1", "sw"), Example("b", "2", "th"), Example("c", "3", "swh", "its own")]
    given: list[Any] = []

    def read(data: Any) -> list[Example]:
        given.append(data)
        return own

    register_task("own", Task(read, "number", 4, prompt="math"))
    asked = Asked(lambda example: example.target)
    result = run(asked, "own", {"any": "thing"}, tmp_path / "a")
    assert given == [{"any": "thing"}]
    assert {name: score.count for name, score in result.scores.items()} == {"Swahili": 2, "Thai": 1}
    assert sorted(asked.prompts) == sorted([math_prompt("a"), "its own", math_prompt("b")])
    few = run(asked, "own", None, tmp_path / "b", languages=["swh"], limit=1)
    assert {name: score.count for name, score in few.scores.items()} == {"Swahili": 1}
    assert run(asked, "own", [replace(own[0], language="Swahili")], tmp_path / "c").average == 100
    assert len(given) == 2
    with pytest.raises(ArgumentError, match="skip_bad: expected False, for the task own has a reader of its own"):
        run(asked, "own", None, tmp_path / "d", skip_bad=True)


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("mgsm", Task("tsv", "text", 5), "name: expected one that no task has, got 'mgsm'; it is the library's"),
        ("there", Task("tsv", "text", 5), "name: expected one that no task has, got 'there'; unregister_task removes"),
        ("a/b", Task("tsv", "text", 5), "name: expected letters, digits, '-' and '_', got 'a/b'"),
        ("own.py", Task("tsv", "text", 5), "name: expected letters, digits, '-' and '_', got 'own.py'"),
        ("", Task("tsv", "text", 5), "name: expected letters"),
        (None, Task("tsv", "text", 5), "name: expected letters"),
        ("own", "tsv", "task: expected a layalign.evaluation.Task, got 'tsv'"),
    ],
)
def test_what_cannot_be_registered(name: Any, task: Any, message: str) -> None:
    register_task("there", Task("tsv", "text", 5))
    before = dict(TASKS)
    with pytest.raises(ArgumentError, match=re.escape(message)):
        register_task(name, task)
    assert before == TASKS


@pytest.mark.parametrize("name", ["mgsm", "nowhere", None])
def test_what_cannot_be_unregistered(name: Any) -> None:
    with pytest.raises(ArgumentError, match="name: expected that of a task of register_task"):
        unregister_task(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reader": "poetry"}, "reader: expected one of bilingual_pairs, pairs, tsv"),
        ({"reader": list}, "reader: expected one of bilingual_pairs"),
        ({"scorer": "taste"}, "scorer: expected one of number, signed-number"),
        ({"scorer": len}, "scorer: expected a function that takes an example and an answer"),
        ({"scorer": lambda answer: True}, "scorer: expected a function that takes an example and an answer"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected a whole number from 1 up, got 0"),
        ({"max_new_tokens": None}, "max_new_tokens: expected a whole number from 1 up, got None"),
        ({"stage": "last"}, "stage: expected one of translation, task, got 'last'"),
        ({"prompt": "Hello"}, "prompt: expected one of math, source, none, or a template with '{source}', got 'Hello'"),
        ({"reader": "xnli", "prompt": "math"}, "prompt: expected None, for the format xnli has a prompt of its own"),
    ],
)
def test_fields_of_a_task(changes: dict[str, Any], message: str) -> None:
    good = {"reader": "tsv", "scorer": "text", "max_new_tokens": 5}
    with pytest.raises(ArgumentError, match=re.escape(message)):
        Task(**{**good, **changes})


GOOD = Example("q", "5", "Thai", "p", "1")


@pytest.mark.parametrize(
    ("examples", "scorer", "message"),
    [
        ([], "text", "task: the reader of own: expected examples, got none"),
        (["q"], "text", "task: the reader of own: example 1: expected an Example, got 'q'"),
        ([GOOD, replace(GOOD, target="x")], "text", "example 2, its id: expected another one for each Thai example"),
        ([GOOD, replace(GOOD, language="th")], "text", "example 2, its id: expected another one for each Thai example"),
        ([replace(GOOD, target=" ")], "text", "example 1, its target: expected a text that is not empty, got ' '"),
        ([replace(GOOD, target=None)], "text", "example 1, its target: expected a text that is not empty, got None"),
        ([replace(GOOD, source="")], "text", "example 1, its source: expected a text that is not empty"),
        ([replace(GOOD, id=7)], "text", "example 1, its id: expected text, got 7"),
        ([replace(GOOD, choices=["5"])], "text", "example 1, its choices: expected a tuple of texts"),
        ([replace(GOOD, prompt="")], "text", "example 1: expected a prompt for the stage 'task', from the reader or"),
        ([GOOD], "label", "data: the Thai example '1': expected several different labels, none of them empty, got ()"),
        ([replace(GOOD, choices=("5", ""))], "label", "expected several different labels, none of them empty"),
        ([replace(GOOD, choices=("a", "b"))], "label-likelihood", "expected the right label among a, b, got '5'"),
        ([replace(GOOD, target="five")], "number", "data: the Thai example '1': expected a target with a number"),
        ([replace(GOOD, target="five")], "signed-number", "expected a target with a number, got 'five'"),
    ],
)
def test_examples_that_would_be_scored_wrongly(examples: list[Any], scorer: str, message: str, tmp_path: Path) -> None:
    register_task("own", Task(lambda data: iter(examples), scorer, 5))
    asked = Asked(lambda example: "5")
    with pytest.raises((ArgumentError, DataError), match=re.escape(message)):
        run(asked, "own", None, tmp_path / "out")
    assert not asked.prompts and not (tmp_path / "out").exists()


def test_a_reader_that_raises(tmp_path: Path) -> None:
    def read(data: Any) -> Iterator[Example]:
        yield GOOD
        raise KeyError("answer")

    register_task("own", Task(read, "text", 5))
    with pytest.raises(DataError, match="task: the reader of own raised KeyError: 'answer'"):
        run(Asked(yes), "own", None, tmp_path)


# The scorer


@pytest.mark.parametrize(
    ("verdict", "message"),
    [
        (lambda: 1 / 0, "scorer of own raised ZeroDivisionError: division by zero, for the Swahili example 'b'"),
        (lambda: None, "task: the scorer of own: expected True or False for the Swahili example 'b', got None"),
        (lambda: 1, "task: the scorer of own: expected True or False for the Swahili example 'b', got 1"),
    ],
)  # fmt: skip
def test_a_scorer_that_fails_loses_no_answer(verdict: Callable[[], Any], message: str, tmp_path: Path) -> None:
    data = [Example("a", "1", "Swahili", "p", "a"), Example("b", "2", "Swahili", "q", "b")]

    def scorer(example: Example, answer: str) -> Any:
        return verdict() if example.id == "b" else True

    register_task("own", Task("tsv", scorer, 5))
    asked = Asked(lambda example: example.target)
    with pytest.raises(ArgumentError, match=re.escape(message)) as stopped:
        run(asked, "own", data, tmp_path)
    assert str(stopped.value).endswith(f"kept in {tmp_path}, and a rerun scores them without asking again")
    unregister_task("own")
    register_task("own", Task("tsv", "text", 5))
    assert run(asked, "own", data, tmp_path).average == 100
    assert len(asked.prompts) == 2


def test_failed_answers_are_wrong_without_asking_the_scorer(tmp_path: Path) -> None:
    register_task("own", Task("tsv", lambda example, answer: True, 5))
    result = run(lambda batch: [None], "own", [GOOD], tmp_path, non_finite="fail")
    assert (result.scores["Thai"].correct, result.scores["Thai"].failed) == (0, 1)


def close(example: Example, answer: str, tolerance: float = 0.0) -> bool:
    return abs(float(answer) - float(example.target)) <= tolerance


def within(tolerance: float) -> Callable[[Example, str], bool]:
    return lambda example, answer: close(example, answer, tolerance)


def test_runs_scored_by_other_functions_do_not_compare(tmp_path: Path) -> None:
    data = [Example(str(i), str(i), language, "p", str(i)) for language in ("Swahili", "Thai") for i in range(2)]
    ways = {
        "plain": close, "again": close, "wide": functools.partial(close, tolerance=1.0),
        "wider": functools.partial(close, tolerance=2.0), "made": within(1.0), "other": within(2.0), "name": "text",
    }  # fmt: skip
    for name, scorer in ways.items():
        run(lambda batch: ["0"] * len(batch), "tsv", data, tmp_path / name, scorer=scorer)
    assert compare_runs(tmp_path / "plain", tmp_path / "again").pooled.difference == 0
    assert scorer_name(within(1.0)) == scorer_name(within(1.0))  # in another process it has another address
    for a, b in [("plain", "wide"), ("wide", "wider"), ("made", "other"), ("plain", "name")]:
        with pytest.raises(ArgumentError, match="run_b: expected answers scored as those of run_a"):
            compare_runs(tmp_path / a, tmp_path / b)
    # One language judged again: the other one's predictions are those of before.
    run(lambda batch: ["0"] * len(batch), "tsv", data, tmp_path / "wide", scorer=close, languages=["Thai"])
    with pytest.raises(ArgumentError, match="run_b: expected Swahili answers scored as those of run_a"):
        compare_runs(tmp_path / "plain", tmp_path / "wide")


# From a file


def own_file(folder: Path, text: str = EXAMPLE) -> Path:
    file = folder / "own_task.py"
    file.write_text(text, encoding="utf-8")
    return file


def test_the_documented_file_in_python_and_a_rerun(tmp_path: Path) -> None:
    file, data, out = own_file(tmp_path), questions(tmp_path / "data"), tmp_path / "out"
    asked = Asked(yes)
    result = run(asked, file, data, out)
    assert {name: (s.correct, s.count) for name, s in result.scores.items()} == {"Swahili": (2, 3), "Thai": (0, 1)}
    assert result.task == "is-question" and "is-question" in TASKS
    assert asked.prompts.count("Is this sentence a question, yes or no?\nMoja?\nAnswer:") == 1
    assert run(asked, str(file), data, out).scores == run(asked, "is-question", data, out).scores == result.scores
    assert len(asked.prompts) == 4
    # Another scorer judges the old answers.
    own_file(tmp_path, EXAMPLE.replace(".startswith(example.target)", ".startswith('yes')"))
    again = run(asked, file, data, out)
    assert (again.average, len(asked.prompts)) == (100, 4)
    assert again.scoring["scorer"].startswith("agrees ") and again.scoring != result.scoring
    # Other questions or settings are not those of these answers.
    for old, new, message in [
        ("Answer:", "Say:", "holds outputs for other Swahili examples"),
        ("max_new_tokens=8", "max_new_tokens=9", "holds outputs made with max_new_tokens 8, not 9"),
        ("prompt=prompt", "prompt=prompt, stage='translation'", "holds outputs made with stage task, not translation"),
        ("is-question", "is-no-question", "holds outputs made with task is-question, not is-no-question"),
    ]:
        own_file(tmp_path, EXAMPLE.replace(old, new))
        with pytest.raises(ArgumentError, match=message):
            run(asked, file, data, out)
    assert len(asked.prompts) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (", "SyntaxError: "),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("", "expected one register_task, got 0"),
        ("{0}register_task('a', Task('tsv', 'text', 5))\nregister_task('b', Task('tsv', 'text', 5))", "got 2"),
        ("{0}register_task('mgsm', Task('tsv', 'text', 5))", "name: expected one that no task has, got 'mgsm'"),
        ("{0}register_task('a', Task('tsv', 'text', 5))\nraise KeyError('x')", "KeyError: 'x'"),
    ],
)
def test_files_that_register_no_task(text: str, message: str, tmp_path: Path) -> None:
    file = own_file(tmp_path, text.format("from layalign.evaluation import Task, register_task\n"))
    before = dict(TASKS)
    with pytest.raises(ArgumentError, match=re.escape(f"task: {file} cannot be used: {message}"[:40])) as stopped:
        run(Asked(yes), file, questions(tmp_path / "data"), tmp_path / "out")
    assert message in str(stopped.value) and "\n" not in str(stopped.value)
    assert before == TASKS and not (tmp_path / "out").exists()
    with pytest.raises(ArgumentError, match="task: expected a Python file that registers a task, got '.*none.py'"):
        run(Asked(yes), tmp_path / "none.py", "x", tmp_path / "out")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(2)
    parts = tiny_encoder(vocab_size=len(TEXT)), tiny_llm(vocab_size=len(TEXT))
    model = LayAlignForCausalLM.from_encoder_and_llm(*parts)
    model.save_pretrained(tmp_path / "model", save_frozen=True)
    save_tokenizers(tmp_path / "model", ENCODER, TEXT)
    return tmp_path / "model"


@pytest.mark.slow
def test_the_documented_file_by_the_command_and_in_two_processes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One process reads: here the reader gives each process the examples in another order."""
    data = questions(tmp_path / "data")
    write_lines(data / "de.tsv", *(f"{'Wer ' * i}{i}?\tyes" for i in range(7)))
    shuffled = EXAMPLE.replace(
        "def read(folder):", "def read(folder):\n    yield from set(ordered(folder))\n\n\ndef ordered(folder):"
    )
    arguments = ["evaluate", "-c", str(checkpoint), "-d", str(data), "--device", "cpu", "-b", "1"]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "-t", str(own_file(tmp_path)), "-o", str(tmp_path / "one")])
    assert stop.value.code in (0, None) and "is-question: accuracy" in capsys.readouterr().out
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "layalign"]
    arguments += ["-t", str(own_file(tmp_path, shuffled)), "-o", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONHASHSEED", None)
    found = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=280)
    assert found.returncode == 0, (found.stdout + found.stderr)[-4000:]
    for language in ("German", "Swahili", "Thai"):
        one, two = (
            {p["id"]: p for p in json.loads((tmp_path / name / f"predictions/{language}.json").read_text())}
            for name in ("one", "two")
        )
        assert one == two and one


# In the library


def test_a_task_of_the_library_takes_two_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A format in data/records.py and a task in evaluation/tasks.py: nothing else names tasks or formats."""

    def parse_riddle(record: records.Record) -> Example:
        riddle = record.text("riddle")
        return Example(riddle, record.text("solution"), record.name_of_language(), f"Riddle: {riddle}", record.own_id())

    form = records.Format(parse_riddle, ("riddles_*.tsv",), columns=("riddle", "solution"))
    monkeypatch.setitem(records.FORMATS, "riddles", form)
    monkeypatch.setitem(tasks.TASKS, "riddles", Task("riddles", "text", 7))
    monkeypatch.setattr(tasks, "OWN", tuple(tasks.TASKS))
    write_lines(tmp_path / "data/riddles_sw.tsv", "a?\tb", "c?\td")
    asked = Asked(lambda example: "b")
    for number, data in enumerate((tmp_path / "data", f"riddles:{tmp_path / 'data'}")):
        assert run(asked, "riddles", data, tmp_path / str(number)).average == 50
    assert set(asked.prompts) == {"Riddle: a?", "Riddle: c?"}
    with pytest.raises(ArgumentError, match="it is the library's"):
        register_task("riddles", Task("tsv", "text", 5))


# The configuration


def test_a_configuration_and_changes(tmp_path: Path) -> None:
    config = EvalConfig(limit=1, model_name="test", scorer="text", languages=["th"])
    data = [Example("a", "1", "Thai"), Example("b", "2", "Thai"), Example("c", "3", "Swahili")]
    answers = Asked(lambda example: example.target)
    assert evaluate(answers, None, None, "tsv", data, tmp_path / "a", config).scores["Thai"].count == 1
    both = evaluate(answers, None, None, "tsv", data, tmp_path / "b", config, limit=None, languages=None)
    assert {name: score.count for name, score in both.scores.items()} == {"Thai": 2, "Swahili": 1}
    assert (config.limit, config.languages) == (1, ["th"])
    with pytest.raises(AttributeError):
        config.limit = 2  # type: ignore[misc]
    message = r"batchsize: expected a field of EvalConfig \(languages, batch_size, .*, progress\)"
    with pytest.raises(ArgumentError, match=message):
        evaluate(answers, None, None, "tsv", data, tmp_path / "c", config, batchsize=3)
    with pytest.raises(ArgumentError, match="config: expected an EvalConfig or None, got {'limit': 1}"):
        evaluate(answers, None, None, "tsv", data, tmp_path / "c", {"limit": 1})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"languages": "sw"}, "languages: expected a list of names or codes, got 'sw'"),
        ({"batch_size": 0}, "batch_size: expected a number >= 1, got 0"),
        ({"batch_size": None}, "batch_size: expected a whole number"),
        ({"limit": 0}, "limit: expected a number >= 1, got 0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens: expected a whole number"),
        ({"max_prompt_length": 0}, "max_prompt_length: expected a whole number from 1 up, got 0"),
        ({"resume": 1}, "resume: expected true or false, got 1"),
        ({"progress": "yes"}, "progress: expected true or false, got 'yes'"),
        ({"scorer": "taste"}, "scorer: expected one of number"),
        ({"label_match": "loose"}, "label_match: expected 'exact' or 'start', got 'loose'"),
        ({"measures": ["ter"]}, "measures: expected some of chrf, bleu"),
        ({"stage": "last"}, "stage: expected one of translation, task, got 'last'"),
        ({"generation": {1: 2}}, "generation: expected a mapping of arguments of generate"),
        ({"model_name": 3}, "model_name: expected text, got 3"),
        ({"non_finite": "ignore"}, "non_finite: expected one of stop, fail, got 'ignore'"),
    ],
)
def test_fields_of_a_configuration(changes: dict[str, Any], message: str) -> None:
    for make in (lambda: EvalConfig(**changes), lambda: EvalConfig().changed(changes)):
        with pytest.raises(ArgumentError, match=re.escape(message)):
            make()


def test_the_documented_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "datas/mgsm_sw.tsv", "a\t1")
    calls: list[dict[str, Any]] = []
    torch.manual_seed(2)
    model = LayAlignForCausalLM.from_encoder_and_llm(tiny_encoder(vocab_size=len(TEXT)), tiny_llm(vocab_size=len(TEXT)))
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **given: (calls.append(given), generate(**given))[1])
    names = {"model": model, "encoder_tokenizer": ENCODER, "llm_tokenizer": TEXT}
    monkeypatch.setitem(TASKS, "mgsm", Task("mgsm", "number", 4))
    exec(compile(CONFIG, "evaluation.md", "exec"), {**names, "evaluate": evaluate})
    assert [call.get("num_beams") for call in calls] == [4, None]
