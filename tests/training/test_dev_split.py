"""The dev split: from files of its own, or cut from the training text so that no English sentence stands in both."""

from __future__ import annotations

import json
import logging
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_training import TinyParts, save_parts, without_record
from tiny_training import training_config as make_config

from layalign.data import Example
from layalign.data.sentences import apart_from, cut_by_sentence, english_keys, sentence_key
from layalign.training import load_train_config, read_dev_examples, read_examples, train
from layalign.training.checkpoints import publish
from layalign.training.record import FILE
from layalign.training.run import _split
from layalign.utils.errors import ArgumentError, DataError


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    return save_parts(tmp_path_factory.mktemp("parts"))


def keys(examples: list[Example]) -> set[str]:
    return {sentence_key(example.target) for example in examples}


# Sentences


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("I'm fine.", "I’m  FINE!"),
        ("Don't go, Tom", "don’t go — Tom?"),
        ("“Really?”", "Really"),
        ("ＡＢＣ　１", "abc 1"),
        ("Straße", "STRASSE"),
        (" a\u00a0b\u200b ", "a b"),
    ],
)
def test_the_same_sentence(one: str, other: str) -> None:
    assert sentence_key(one) == sentence_key(other) != ""


@pytest.mark.parametrize(
    ("one", "other"),
    [("2+3", "2=3"), ("a b", "ab"), ("हिन्दी", "हनद"), ("résumé", "resume"), ("?", "!"), ("I am", "I am not")],
)
def test_other_sentences(one: str, other: str) -> None:
    assert sentence_key(one) != sentence_key(other)


def test_questions_go_by_their_written_answer_and_choices_by_their_id() -> None:
    def question(source: str, target: str, language: str, id: str = "", choices: tuple[str, ...] = ()) -> Example:
        return Example(source, target, language, source, id, choices)

    long = "First add two and three. The answer is 5"
    examples = [
        question("zwei plus drei?", long, "German", "1"),
        question("mbili na tatu?", long, "Swahili", "9"),
        question("eins?", "The answer is 1", "German", "2"),
        question("noch eins?", "The answer is 1", "German", "3"),  # an answer of two questions names neither
        question("moja?", "The answer is 1", "Swahili", "2"),
        question("was? (A) x (B) y", "A", "German", "q7", ("A", "B")),
        question("nini? (A) x (B) y", "A", "Swahili", "q7", ("A", "B")),
        question("wer? (A) x (B) y", "A", "German", "q8", ("A", "B")),
    ]
    found = english_keys(examples, translation=False)
    groups = {tuple(i for i, key in enumerate(found) if key == each) for each in found}
    assert groups == {(0, 1), (2, 4), (3,), (5, 6), (7,)}
    without = [replace(example, id="") for example in examples]
    assert english_keys(examples, translation=False, same_files=False) == english_keys(without, translation=False)
    found = english_keys(without, translation=False)
    assert len(set(found)) == 7 and found[0] == found[1]


# Cutting


@pytest.mark.parametrize("seed", range(6))
def test_no_sentence_of_dev_is_left_in_training(seed: int) -> None:
    draw = random.Random(seed)
    forms = ["{} {}", "{} {}.", "  {}, {}!"]
    words = ["one", "two", "red", "blue", "cat", "dog"]
    examples = [
        Example(
            f"text {i}", draw.choice(forms).format(*draw.choices(words, k=2)).title(), draw.choice(["Thai", "Urdu"])
        )
        for i in range(200)
    ]
    train_set, dev, neither = cut_by_sentence(examples, 40, translation=True)
    assert len(dev) == 40 and len(train_set) + 40 + neither == 200 and train_set
    assert not keys(train_set) & keys(dev)
    plain = keys(examples[:40]) & keys(examples[40:])
    assert plain  # the published cut leaves some in both
    order = {example: position for position, example in enumerate(examples)}
    for part in (train_set, dev):
        assert [order[example] for example in part] == sorted(order[example] for example in part)


def test_without_repeated_sentences_it_is_the_published_cut() -> None:
    examples = [Example(f"satz {i}", f"sentence {i}", "German") for i in range(20)]
    assert cut_by_sentence(examples, 5, translation=True) == (examples[5:], examples[:5], 0)
    assert cut_by_sentence(examples, 0, translation=True) == (examples, [], 0)


def test_parallel_text_gives_few_sentences_in_all_languages() -> None:
    names = ["German", "Thai", "Swahili"]
    examples = [Example(f"{name} {i}", f"sentence {i}", name) for i in range(30) for name in names]
    random.Random(0).shuffle(examples)
    train_set, dev, neither = cut_by_sentence(examples, 10, translation=True)
    assert (len(train_set), len(dev), neither) == (90 - 12, 10, 2)
    assert len(keys(dev)) == 4


@pytest.mark.slow
def test_the_default_is_by_sentence_and_presets_are_as_published(parts: TinyParts, tmp_path: Path) -> None:
    config = make_config(parts, tmp_path, dev_cut=None)
    examples = read_examples(config)
    by_sentence, by_position = (
        _split(replace(config, dev_cut=cut), examples, None) for cut in ("sentence", "position")
    )
    assert by_position == (examples[8:], examples[:8])
    assert not keys(by_sentence[0]) & keys(by_sentence[1]) and keys(by_position[0]) & keys(by_position[1])
    train(replace(config, max_steps=1))
    record = json.loads((tmp_path / FILE).read_text())
    assert record["settings"]["dev_cut"] == "sentence"
    assert record["data"]["train"]["examples"] == len(by_sentence[0])
    assert load_train_config(preset="math").dev_cut == "position"
    with pytest.raises(ArgumentError, match="^dev_size: 48 leaves nothing to train on, there are 48 examples"):
        _split(replace(config, dev_cut="sentence", dev_size=48), examples, None)


# A run keeps its cut


@pytest.mark.slow
@pytest.mark.parametrize("old", ["run.json", "train_config.yaml"])
def test_a_run_goes_on_with_the_cut_that_it_began_with(parts: TinyParts, tmp_path: Path, old: str) -> None:
    """A run from before the key, by its record or by its settings alone, keeps its cut by position."""
    changes: dict[str, Any] = {"max_steps": 2, "save_steps": 2}
    first = train(make_config(parts, tmp_path, **changes))
    without_record(tmp_path)
    settings = yaml.safe_load((tmp_path / "train_config.yaml").read_text())
    for key in ("dev_cut", "dev_data", "dev_overlap", "encoder_dropout"):
        del settings[key]
    (tmp_path / "train_config.yaml").write_text(yaml.safe_dump(settings))
    if old == "run.json":
        (tmp_path / "checkpoint-2").rename(tmp_path / "old")
        train(make_config(parts, tmp_path / "other", **changes))
        record = json.loads((tmp_path / "other" / FILE).read_text())
        record["settings"] = settings
        (tmp_path / "old" / FILE).write_text(json.dumps(record))
        (tmp_path / "old" / "manifest.json").unlink()
        publish(tmp_path / "old", tmp_path / "checkpoint-2")
    changes["max_steps"] = 3
    with pytest.raises(ArgumentError, match="^dev_cut: the run in .* has 'position', this one 'sentence'"):
        train(make_config(parts, tmp_path, dev_cut="sentence", **changes))
    second = train(make_config(parts, tmp_path, dev_cut=None, **changes))
    assert second.resumed_from == str(tmp_path / "checkpoint-2")
    assert (second.train_examples, second.dev_examples) == (first.train_examples, first.dev_examples) == (40, 8)
    record = json.loads((tmp_path / "checkpoint-3" / FILE).read_text())
    assert record["settings"]["dev_cut"] == "position"


@pytest.mark.slow
def test_a_run_cut_by_sentence_goes_on_so(parts: TinyParts, tmp_path: Path) -> None:
    train(make_config(parts, tmp_path, dev_cut=None, max_steps=2, save_steps=2))
    with pytest.raises(ArgumentError, match="^dev_cut: the run in .* has 'sentence', this one 'position'"):
        train(make_config(parts, tmp_path, max_steps=3, save_steps=2))
    assert train(make_config(parts, tmp_path, dev_cut=None, max_steps=3, save_steps=2)).resumed_from


# Files of its own


def write_dev(folder: Path, lines: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "de.tsv").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return folder


@pytest.mark.slow
def test_dev_files(parts: TinyParts, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_dev(tmp_path / "dev", [f"satz {i}\tsentence {i}" for i in range(6)])
    config = make_config(parts, tmp_path / "run", dev_data=f"pairs:{folder}", max_steps=2, save_steps=2, eval_steps=1)
    summary = train(config)
    assert (summary.train_examples, summary.dev_examples) == (48, 6)
    assert [entry["step"] for entry in summary.log_history if "eval_loss" in entry] == [0, 1, 2, 2]
    assert "dev_data" not in caplog.text
    few = replace(config, dev_size=4)
    assert len(read_dev_examples(few)) == 4 and set(read_dev_examples(few)) < set(read_dev_examples(config))
    assert "dev_data: 4 of its 6 examples are used (dev_size)" in caplog.text
    # Languages and limit are of the training data; a mapping has its own.
    other = make_config(parts, tmp_path / "x", languages=["Swahili"], limit=2, dev_data={"path": str(folder)})
    assert len(read_dev_examples(other)) == 6 and len(read_examples(other)) == 2
    assert len(read_dev_examples(replace(other, dev_data={"path": str(folder), "limit": 3}))) == 3
    both = [f"pairs:{folder}", {"path": parts.data, "format": "bilingual_pairs", "languages": ["Swahili"], "limit": 2}]
    assert len(read_dev_examples(replace(other, dev_data=both))) == 8
    # The same run, wherever the files lie; other dev examples are another run.
    folder.rename(tmp_path / "moved")
    moved = replace(config, dev_data=f"pairs:{tmp_path / 'moved'}", max_steps=3)
    assert train(moved).resumed_from == str(tmp_path / "run" / "checkpoint-2")
    write_dev(tmp_path / "moved", ["satz\tother"])
    with pytest.raises(ArgumentError, match="^dev: the run in .* has other dev examples, 6 of them, this one 1"):
        train(replace(moved, max_steps=4))


def test_sentences_of_dev_files_that_are_trained_on(
    parts: TinyParts, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_dev(tmp_path / "dev", ["rote Katze\tRed cat!", "anderes\tsomething else"])
    config = make_config(parts, tmp_path / "run", dev_data=f"pairs:{folder}")
    examples = read_examples(config)
    same = [example for example in examples if example.target == "red cat"]
    assert {example.language for example in same} == {"German", "Swahili"}
    found, dev = _split(config, examples, read_dev_examples(config))
    assert (len(found), len(dev)) == (48, 2)
    text = f"dev_data: 1 of 2 dev examples share their English with {len(same)} training examples, which are trained"
    assert text in caplog.text
    caplog.clear()
    found, dev = _split(replace(config, dev_overlap="drop"), examples, read_dev_examples(config))
    assert found == [example for example in examples if example not in same] and len(dev) == 2
    assert "which are skipped" in caplog.text
    with pytest.raises(ArgumentError, match="^dev_overlap: drop leaves nothing to train on"):
        _split(replace(config, dev_overlap="drop"), same, read_dev_examples(config))


def test_line_numbers_of_different_files_are_no_overlap() -> None:
    train_set = [
        Example("q", "A", "German", id="1", choices=("A", "B")),
        Example("r", "B", "German", id="2", choices=("A",)),
    ]
    dev = [
        Example("other", "A", "German", id="1", choices=("A", "B")),
        Example("R!", "A", "Thai", id="7", choices=("A",)),
    ]
    assert apart_from(train_set, dev, translation=False) == (train_set[:1], 1)


@pytest.mark.slow
def test_dev_examples_in_memory_win(parts: TinyParts, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(parts, tmp_path, max_steps=1, dev_data="nowhere")
    examples = read_examples(config)
    with caplog.at_level(logging.INFO, "layalign"):
        summary = train(config, examples=examples, dev_examples=[Example("x", "an x", "German")])
    assert (summary.train_examples, summary.dev_examples) == (48, 1)


def test_wrong_dev_files(parts: TinyParts, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="^dev_size: expected at least 1 with dev_data"):
        make_config(parts, tmp_path, dev_data="x", dev_size=0)
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        train(make_config(parts, tmp_path, dev_data="pairs:nowhere"))
    assert make_config(parts, tmp_path, dev_data=Path("a/b")).dev_data == "a/b"
    with pytest.raises(ArgumentError, match="^dev_data: expected a path, .* got None"):
        read_dev_examples(make_config(parts, tmp_path))
    given = {
        "dev_data=2024": "2024",
        "dev_data=pairs:a": "pairs:a",
        "dev_data={path: a, limit: 2}": {"path": "a", "limit": 2},
    }
    assert {text: load_train_config({}, overrides=[text]).dev_data for text in given} == given
    assert load_train_config({"dev_data": "a"}, overrides=["dev_data=null"]).dev_data is None
