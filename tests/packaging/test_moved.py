"""Old import paths and old settings."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from tiny import tiny_model

import layalign
from layalign import LayAlignConfig, LayAlignForCausalLM
from layalign.training import load_train_config
from layalign.utils.errors import ArgumentError, CheckpointError
from layalign.utils.moved import MOVED, RENAMED


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


OLD = {"adapter": True, "fold": "never", "gate": 0.5, "last_layer": "whole", "liger": "never", "prompt": False}
NEW = {
    "use_adapter": True, "fold_projections": "never", "fixed_gate": 0.5, "prune_last_layer": "never",
    "fused_loss": "never", "use_prompt": False,
}  # fmt: skip


def test_old_settings_of_a_model_are_read_written_and_named() -> None:
    with pytest.warns(FutureWarning) as told:
        found = LayAlignConfig(**OLD).to_dict()
    assert {str(each.message) for each in told} == {f"{o}: the setting is now called {RENAMED[o]}" for o in OLD}
    assert NEW.items() <= found.items() and not OLD.keys() & found.keys()
    config = LayAlignConfig()
    for old, new in RENAMED.items():
        with pytest.warns(FutureWarning, match=f"^{old}: the setting is now called {new}$"):
            setattr(config, old, OLD[old])
        assert getattr(config, new) == NEW[new] and old not in vars(config)
        with pytest.warns(FutureWarning, match=f"^{old}: "):
            assert getattr(config, old) == NEW[new]


def test_a_checkpoint_with_old_settings_loads(tmp_path: Path) -> None:
    tiny_model(**NEW).save_pretrained(tmp_path, save_frozen=True)
    saved = json.loads((tmp_path / "config.json").read_text())
    old = {key: value for key, value in saved.items() if key not in NEW} | OLD
    (tmp_path / "config.json").write_text(json.dumps(old))
    with pytest.warns(FutureWarning, match="liger: the setting is now called fused_loss"):
        model = LayAlignForCausalLM.from_pretrained(tmp_path)
    assert NEW.items() <= model.config.to_dict().items()
    with pytest.warns(FutureWarning, match="fold: "):
        assert LayAlignForCausalLM.from_pretrained(tmp_path, fold="always").config.fold_projections == "always"
    (tmp_path / "config.json").write_text(json.dumps({**old, "fold_projections": "auto"}))
    with pytest.raises(CheckpointError, match="fold: expected fold_projections alone"):
        LayAlignForCausalLM.from_pretrained(tmp_path)


def test_the_old_name_of_build_inputs() -> None:
    with pytest.warns(FutureWarning, match=r"layalign.pack is now layalign.build_inputs"):
        assert layalign.pack is layalign.build_inputs


def test_old_names_of_a_model() -> None:
    model = tiny_model()
    for old, new in (("pack", "build_inputs"), ("unwrap", "unload"), ("folding", "key_values")):
        with pytest.warns(FutureWarning, match=f"^{old}: it is now called {new}$"):
            assert getattr(model, old) == getattr(model, new)


def test_old_keys_of_a_training_configuration(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("{adapter: true, gate: 0.5, stages: {task: {prompt: false}}}")
    with pytest.warns(FutureWarning, match="gate: the setting is now called fixed_gate"):
        config = load_train_config(tmp_path / "run.yaml", stage="task")
    assert (config.use_adapter, config.fixed_gate, config.use_prompt) == (True, 0.5, False)
    with pytest.warns(FutureWarning, match="prompt: "):
        assert load_train_config({}, overrides=["prompt=false"]).use_prompt is False
    with pytest.raises(ArgumentError, match="gate: expected fixed_gate alone"):
        load_train_config({"gate": 0.5, "fixed_gate": 0.5})
