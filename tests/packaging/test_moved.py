"""Old import paths."""

from __future__ import annotations

import importlib
import sys

import pytest

from layalign.utils.moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_gives_the_new_module_and_names_it(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if old == "layalign.harness":
        pytest.importorskip("lm_eval")
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(FutureWarning, match=f"{old} has moved, import {MOVED[old]}$"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(MOVED[old])


def test_a_module_inside_a_moved_package_is_there_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("layalign.analysis", "layalign.analysis.similarity"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.warns(FutureWarning, match="import layalign.experiments.analysis"):
        module = importlib.import_module("layalign.analysis.similarity")
    assert module is importlib.import_module("layalign.experiments.analysis.similarity")
