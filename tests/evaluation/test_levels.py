"""Resource levels, and the averages over them in an evaluation's result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from layalign.data import Example
from layalign.data.languages import languages
from layalign.evaluation import evaluate, resource_level
from layalign.evaluation.levels import by_level, resource_class
from layalign.utils.errors import ArgumentError

EVALUATED = {
    "mgsm": "bn de en es fr ja ru sw te th zh",
    "msvamp": "Bengali Chinese English French German Japanese Russian Spanish Swahili Thai",
    "xnli": "ar bg de el en es fr hi ru sw th tr ur vi zh",
    "xcopa": "en et ht id it qu sw ta th tr vi zh",
    "x-csqa": "ar de en es fr hi it ja nl pl pt ru sw ur vi zh",
}


@pytest.mark.parametrize("task", EVALUATED)
def test_every_evaluated_language_has_a_level(task: str) -> None:
    assert all(resource_level(code) in ("high", "medium", "low") for code in EVALUATED[task].split())


def test_classes_of_the_source() -> None:
    classes = {"en": 5, "zh": 5, "nl": 4, "hi": 4, "bn": 3, "th": 3, "ur": 3, "sw": 2, "ht": 2, "qu": 1, "te": 1}
    assert {code: resource_class(code) for code in classes} == classes
    assert [resource_level(code) for code in ("vi", "et", "ht", "si", "jam", "Awadhi")] == [
        "high", "medium", "low", "low", "low", "low",
    ]  # fmt: skip
    assert (resource_class("pa-Arab"), resource_class("de-AT"), resource_class("Krio"), resource_class("Klingon")) == (
        2, 5, None, None,
    )  # fmt: skip


def test_the_classes_of_the_languages_of_the_table() -> None:
    names = [language.name for language in languages() if language.resource_class in range(6)]
    assert len(names) == len(set(names)) == 277


def test_the_papers_grouping_is_for_its_own_languages() -> None:
    codes = EVALUATED["msvamp"].split()
    assert {code for code in codes if resource_level(code, "paper") == "low"} == {"Bengali", "Thai", "Swahili"}
    assert sum(resource_level(code, "paper") == "high" for code in codes) == 7
    assert resource_level("te", "paper") is None
    assert by_level(["Thai", "German"], "xnli", "paper") == {}
    assert by_level(["Thai", "Telugu", "German"], "mgsm", "paper") == {
        "high": ["German"], "low": ["Thai"], "unlisted": ["Telugu"],
    }  # fmt: skip
    with pytest.raises(ArgumentError, match="grouping: expected one of joshi, paper, got 'mine'"):
        resource_level("te", "mine")


def _examples(language: str, wrong: int, count: int = 20) -> list[Example]:
    """`count` questions with ids 0, 1, ...; a model that says 1 gets the first `wrong` wrong."""
    return [Example(f"{language} {i}", "2" if i < wrong else "1", language, id=str(i)) for i in range(count)]


def test_averages_by_level(tmp_path: Path) -> None:
    wrong = {"German": 2, "English": 0, "Thai": 10, "Swahili": 20, "Krio": 5}
    data = [example for language, number in wrong.items() for example in _examples(language, number)]
    result = evaluate(lambda batch: ["1"] * len(batch), None, None, "mgsm", data, tmp_path, model_name="one")
    joshi = result.levels["joshi"]
    assert {level: (score.languages, score.average) for level, score in joshi.items()} == {
        "high": (("German", "English"), pytest.approx(95)),
        "medium": (("Thai",), pytest.approx(50)),
        "low": (("Swahili",), 0),
        "unlisted": (("Krio",), pytest.approx(75)),
    }
    assert joshi["low"].low == 0 and joshi["low"].high == pytest.approx(16.11, abs=0.01)
    assert joshi["high"].low < 95 < joshi["high"].high and joshi["high"].method == "questions"
    assert result.levels["paper"]["low"].average == pytest.approx(25)
    assert result.average == pytest.approx((90 + 100 + 50 + 0 + 75) / 5)
    assert result.average_interval is not None and result.average_interval.low < result.average
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert list(saved)[:5] == ["task", "average", "languages", "files", "skipped"]
    assert saved["levels"]["joshi"]["high"]["languages"] == ["German", "English"]
    assert saved["average_interval"]["method"] == "questions"
    assert saved["scoring"] == {"scorer": "number", "label_match": "exact"}
    lines = (tmp_path / "scores.tsv").read_text().splitlines()
    assert lines[6].startswith("Average\t63.00\t\t100\t")
    assert lines[7].startswith("Average joshi high\t95.00\t\t40\t")
    assert {line.count("\t") for line in lines} == {5}
    again = evaluate(lambda batch: ["1"] * len(batch), None, None, "mgsm", data, tmp_path, model_name="one")
    assert again.to_dict() == result.to_dict()


def test_other_questions_are_drawn_by_language(tmp_path: Path) -> None:
    data = _examples("German", 5) + _examples("English", 5, count=21)
    result = evaluate(lambda batch: ["1"] * len(batch), None, None, "xnli", data, tmp_path, model_name="one")
    assert result.average_interval is not None and result.average_interval.method == "languages"
    assert "paper" not in result.levels
