"""Intervals and paired tests against values worked out by hand, and `layalign compare` on two runs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layalign.cli import main
from layalign.data import Example
from layalign.evaluation import compare_runs, evaluate
from layalign.evaluation.compare import mcnemar
from layalign.evaluation.intervals import bootstrap_totals, holm, is_parallel, macro_interval, sign_flip_p
from layalign.utils.errors import ArgumentError, DataError


def test_mcnemar_by_hand() -> None:
    # Twice the binomial tail: (1 + 8 + 28) * 2 / 2^8, and 2 / 2^5.
    assert mcnemar(2, 6) == mcnemar(6, 2) == pytest.approx(74 / 256)
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(3, 3) == mcnemar(0, 0) == 1.0


def test_the_sign_flip_test_is_the_enumeration_of_all_signs() -> None:
    for values in ([2, -1, 3, 0, 1], [1, 1, 1, -1], [4, 4, -3], [0, 0]):
        sums = [abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in
                itertools.product((-1, 1), repeat=len(values))]  # fmt: skip
        assert sign_flip_p(values) == pytest.approx(np.mean([total >= abs(sum(values)) for total in sums]))
    assert sign_flip_p([1] * 6 + [-1] * 2 + [0] * 50) == pytest.approx(mcnemar(2, 6))
    # The same difference in ten languages is one question's evidence, not ten.
    assert sign_flip_p([10] * 4) == pytest.approx(1 / 8)
    assert mcnemar(40, 0) < 1e-11


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_resamples_have_the_moments_of_drawing_with_replacement() -> None:
    values = [0, 0, 1, 3, 3, 3, 2]
    totals = bootstrap_totals(values, np.random.default_rng(1), 200_000)
    assert totals.mean() == pytest.approx(sum(values), rel=0.01)
    assert totals.var() == pytest.approx(len(values) * np.var(values), rel=0.02)


def _covered(parallel: bool, told: bool, tries: int = 400) -> float:
    """How often the interval of a simulated benchmark holds the true average; questions differ in difficulty."""
    generator, truth, hits = np.random.default_rng(7), 100 * (0.9 + 0.2) / 2, 0
    for attempt in range(tries):
        shape = (1, 150) if parallel else (6, 150)
        hard = np.broadcast_to(generator.random(shape) < 0.5, (6, 150))
        answers = (generator.random((6, 150)) < np.where(hard, 0.2, 0.9)).astype(int)
        interval = macro_interval(list(answers), told, seed=attempt, resamples=500)
        hits += interval.low <= truth <= interval.high
    return hits / tries


@pytest.mark.slow
def test_intervals_cover_at_their_level() -> None:
    assert 0.91 < _covered(parallel=True, told=True) < 0.98
    assert 0.91 < _covered(parallel=False, told=False) < 0.98
    # Ids may be equal by chance: drawing unrelated questions together does no harm.
    assert 0.91 < _covered(parallel=False, told=True) < 0.98
    # Drawn by language, translations of one question would count as many.
    assert _covered(parallel=True, told=False) < 0.8


def test_intervals_of_differences_cover_at_their_level() -> None:
    generator, hits = np.random.default_rng(3), 0
    for attempt in range(400):
        base = generator.random(200) < 0.6
        rows = []
        for _ in range(4):
            a, b = (np.where(generator.random(200) < 0.8, base, generator.random(200) < 0.6) for _ in range(2))
            rows.append((b | (generator.random(200) < 0.1)).astype(int) - a.astype(int))
        interval = macro_interval(rows, True, differences=True, seed=attempt, resamples=500)
        hits += interval.low <= 100 * 0.4 * 0.1 <= interval.high
    assert 0.91 < hits / 400 < 0.98


def test_the_edges_of_intervals() -> None:
    assert macro_interval([[1] * 10, [1] * 10], True).low == pytest.approx(72.25, abs=0.01)
    assert macro_interval([[1] * 10, [1] * 10], False).low == pytest.approx(83.89, abs=0.01)
    same = macro_interval([[0] * 10], True, differences=True)
    assert (same.low, same.high) == pytest.approx((-27.75, 27.75), abs=0.01)
    balanced = macro_interval([[1, 0], [-1, 0]], True, differences=True)
    assert balanced.low == -balanced.high < 0
    one = macro_interval([[0, 1, 1, 0, 1]], True, seed=4)
    assert one == macro_interval([[0, 1, 1, 0, 1]], True, seed=4)
    with pytest.raises(ArgumentError, match="outcomes: expected at least one"):
        macro_interval([[1], []], False)
    with pytest.raises(ArgumentError, match="outcomes: expected rows of one length"):
        macro_interval([[1], [1, 0]], True)
    assert is_parallel([["1", "2"], ["1", "2"]]) and is_parallel([["1"]])
    for ids in ([["1", "2"], ["2", "1"]], [["", "1"], ["", "1"]], [["1", "1"], ["1", "1"]]):
        assert not is_parallel(ids)


QUESTIONS = 12
# Questions that are answered right, by run and language.
RIGHT: dict[str, dict[str, set[int]]] = {
    "a": {"Swahili": {0, 1, 2}, "German": set(range(8)), "Thai": {3}},
    "b": {"Swahili": {2, 3, 4, 5, 6, 7, 8}, "German": set(range(1, 9)), "Klingon/old": {0}},
}


def _run(folder: Path, name: str, task: str = "mgsm", **options: Any) -> Path:
    right = RIGHT[name]
    data = [Example(f"{lang} {i}", "1", lang, id=str(i)) for lang in right for i in range(QUESTIONS)]

    def answer(batch: list[Example]) -> list[str]:
        return ["1" if int(example.id) in right[example.language] else "0" for example in batch]

    evaluate(answer, None, None, task, data, folder, model_name=name, **options)
    return folder


def test_two_runs(tmp_path: Path) -> None:
    found = compare_runs(_run(tmp_path / "a", "a"), _run(tmp_path / "b", "b"))
    swahili = found.languages["Swahili"]
    assert (swahili.only_a, swahili.only_b, swahili.count) == (2, 6, 12)
    assert (swahili.p, swahili.p_questions) == pytest.approx((74 / 256, 74 / 256))
    assert swahili.p_holm == pytest.approx(2 * 74 / 256)
    assert swahili.difference == pytest.approx(100 * 4 / 12) == swahili.b - swahili.a
    assert swahili.low < swahili.difference < swahili.high
    german = found.languages["German"]
    assert (german.only_a, german.only_b, german.p, german.difference) == (1, 1, 1.0, 0.0)
    assert (found.pooled.only_a, found.pooled.only_b, found.pooled.count) == (3, 7, 24)
    assert found.pooled.p == pytest.approx(2 * (1 + 10 + 45 + 120) / 2**10)
    # By question: 0 loses in both, 1 in one, 3 to 7 are won in one, 8 in both.
    signs = itertools.product((-1, 1), repeat=8)
    sums = [abs(sum(s * v for s, v in zip(flips, (2, 1, 1, 1, 1, 1, 1, 2), strict=True))) for flips in signs]
    assert found.pooled.p_questions == pytest.approx(np.mean([total >= 4 for total in sums]))
    assert found.pooled.difference == pytest.approx(100 * 4 / 24)
    assert (found.only_in_a, found.only_in_b) == (("Thai",), ("Klingon/old",))
    assert found.settings == {"model": ("a", "b")}
    assert found.levels["joshi"]["low"] == found.levels["paper"]["low"]
    assert found.levels["joshi"]["low"].only_b == 6
    back = compare_runs(tmp_path / "b", tmp_path / "a").languages["Swahili"]
    assert (back.only_a, back.difference, back.p) == (6, -swahili.difference, swahili.p)
    assert found == compare_runs(tmp_path / "a", tmp_path / "b")


def test_a_language_whose_name_no_file_can_have(tmp_path: Path) -> None:
    found = compare_runs(_run(tmp_path / "b", "b"), _run(tmp_path / "c", "b"))
    assert list(found.languages) == ["Swahili", "German", "Klingon/old"]
    assert {pairing.p for pairing in found.languages.values()} == {1.0}


def test_runs_that_do_not_match_are_refused(tmp_path: Path) -> None:
    a = _run(tmp_path / "a", "a")
    for folder, name, options, message in [
        ("task", "b", {"task": "msvamp"}, "run_b: expected an evaluation of the task of run_a, got mgsm and msvamp"),
        ("limit", "b", {"limit": 5}, "run_b: expected the Swahili questions of run_a, got other ones"),
        ("scorer", "b", {"scorer": "text"}, "run_b: expected answers scored as those of run_a"),
        ("language", "b", {"languages": ["Klingon/old"]}, "run_b: expected a language that run_a has"),
    ]:
        languages = options.pop("languages", None)
        other = _run(tmp_path / folder, name, **options)
        if languages:  # a run of that language alone
            settings = json.loads((other / "settings.json").read_text())
            settings["languages"] = {language: settings["languages"][language] for language in languages}
            (other / "settings.json").write_text(json.dumps(settings))
        with pytest.raises(ArgumentError, match=message):
            compare_runs(a, other)
    with pytest.raises(ArgumentError, match="run_a: expected the output folder of an evaluation"):
        compare_runs(tmp_path / "nowhere", a)
    b = _run(tmp_path / "b", "b")
    path = b / "predictions" / "German.json"
    for text in ("{", "[]", '[{"id": "0"}]', "3"):
        path.write_text(text)
        with pytest.raises(DataError, match=r"German.json:1: not"):
            compare_runs(a, b)
    path.unlink()
    with pytest.raises(ArgumentError, match="run_b: expected a finished evaluation, got none of German"):
        compare_runs(a, b)
    (b / "settings.json").write_text("[]")
    with pytest.raises(DataError, match=r"settings.json:1: not the settings"):
        compare_runs(a, b)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = _run(tmp_path / "a", "a"), _run(tmp_path / "b", "b")

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(["compare", str(a), str(b), *map(str, arguments)])
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    code, out, _ = run("--output", tmp_path / "new" / "comparison.json")
    assert code == 0
    assert "Swahili" in out and "+33.3" in out and "all 2" in out
    assert "only in A, left out: Thai" in out and "only in B, left out: Klingon/old" in out
    assert "settings that differ: model" in out
    saved = json.loads((tmp_path / "new" / "comparison.json").read_text())
    assert saved["languages"]["Swahili"]["only_b"] == 6
    assert saved == compare_runs(a, b).to_dict()
    code, out, _ = run("--by", "level", "--grouping", "paper")
    assert code == 0 and "low" in out and "Swahili" not in out
    for arguments, message in [
        (("--by", "script"), "by: expected 'language' or 'level', got 'script'"),
        (("--by", "level", "--grouping", "mine"), "grouping: expected one of joshi, paper, got 'mine'"),
    ]:
        assert run(*arguments)[::2] == (2, f"error: {message}\n")
