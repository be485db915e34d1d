"""Translation in evaluation: sacrebleu's scores from sums of sentence statistics, intervals, runs and comparisons."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import sacrebleu

from layalign.errors import ArgumentError, BackendError
from layalign.evaluation import translation
from layalign.evaluation.translation import score_of, translation_scores

OUTPUTS = ["The men went to work.", "I don't speak Japanese", "", "a", "Where is the station?"]
REFERENCES = ["The men have gone to work.", "I speak no Japanese.", "Nothing at all.", "a", "Where's the station?"]


def test_scores_are_those_of_sacrebleu() -> None:
    found = translation_scores(OUTPUTS, REFERENCES)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(OUTPUTS, [REFERENCES]).score, abs=1e-12)
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(OUTPUTS, [REFERENCES]).score, abs=1e-12)
    assert 20 < found["bleu"] < found["chrf"] < 80
    assert found["signatures"]["chrf"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")
    # Any sentences, any number of times, from their statistics alone.
    for drawn in ([0, 0, 3], [2], [1, 4, 4, 0]):
        own = [[texts[i] for i in drawn] for texts in (OUTPUTS, REFERENCES)]
        sums = {name: found["statistics"][name][drawn].sum(axis=0) for name in ("chrf", "bleu")}
        assert score_of("chrf", sums["chrf"]) == pytest.approx(sacrebleu.corpus_chrf(own[0], [own[1]]).score, abs=1e-12)
        assert score_of("bleu", sums["bleu"]) == pytest.approx(sacrebleu.corpus_bleu(own[0], [own[1]]).score, abs=1e-12)
    assert set(translation_scores(["a"], ["a"], ["chrf"])) == {"chrf", "statistics", "signatures"}


def test_scores_of_wrong_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in [
        (("ab", ["a", "b"]), "outputs: expected a list of texts, got 'ab'"),
        ((["a"], [None]), "references: expected a list of texts"),
        (([], []), "outputs: expected one for each of the references, got 0, 0"),
        ((["a"], ["a", "b"]), "outputs: expected one for each of the references, got 1, 2"),
        ((["a"], ["a"], ["ter"]), "metrics: expected one of chrf, bleu"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            translation_scores(*arguments)
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("sacrebleu"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    translation._metric.cache_clear()
    with pytest.raises(BackendError, match=r"sacrebleu: not installed; pip install 'layalign\[translation\]'"):
        translation_scores(["a"], ["a"])
