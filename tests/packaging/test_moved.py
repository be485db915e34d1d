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
