"""The gates over training: one line per logged step, cut where a resumed run goes on."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_model
from tiny_training import TinyParts, save_parts, training_config
from transformers import TrainerCallback

from layalign.nn import GatedCrossAttention
from layalign.training import TrainConfig, build_model, train
from layalign.training.gates import FILE, GateHistory, gate_values, read_gates


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    return save_parts(tmp_path_factory.mktemp("parts"))


def make_config(parts: TinyParts, output: Path, **changes: Any) -> TrainConfig:
    return training_config(parts, output, **{"logging_steps": 2, "save_steps": 3, **changes})


def test_the_gate_that_is_recorded_is_the_one_that_is_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    for number, module in enumerate(model.cross_attention):
        torch.nn.init.constant_(module.adaption_gate, number + 1.0)
    assert gate_values(model) == pytest.approx([1.0, 2.0, 3.0])
    monkeypatch.setattr(GatedCrossAttention, "effective_gate", lambda self: self.adaption_gate.tanh())
    assert gate_values(model) == pytest.approx([math.tanh(1.0), math.tanh(2.0), math.tanh(3.0)])


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step >= self.step


@pytest.mark.slow
def test_a_run_records_its_gates_and_a_resumed_one_goes_on(parts: TinyParts, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    model = build_model(make_config(parts, whole))
    train(make_config(parts, whole), model=model)
    history = read_gates(whole)
    assert [entry["step"] for entry in history] == [0, 2, 4, 6]
    assert history[0]["gates"] == [0.0, 0.0]
    last = [module.adaption_gate.item() for module in model.cross_attention]
    assert history[-1]["gates"] == pytest.approx(last, rel=1e-5)
    assert all(gate != 0 for gate in history[1]["gates"])

    train(make_config(parts, broken), callbacks=[StopAfter(5)])
    assert [entry["step"] for entry in read_gates(broken)][:3] == [0, 2, 4]
    with (broken / FILE).open("a") as file:
        file.write('{"step": 99, "gates": [9, 9]}\n{"step": 5, "ga')  # beyond the checkpoint, and cut off
    # Stopping wrote a checkpoint of step 5; what is resumed is the one of step 3.
    train(make_config(parts, broken, resume=str(broken / "checkpoint-3")))
    again = read_gates(broken)
    assert [entry["step"] for entry in again] == [0, 2, 3, 4, 6]
    assert again[-1]["gates"] == pytest.approx(history[-1]["gates"], rel=1e-5)
    assert len((broken / FILE).read_text().splitlines()) == 5
    assert read_gates(broken / "checkpoint-3") == again[:3]

    train(make_config(parts, broken, resume=False, max_steps=2))
    assert [entry["step"] for entry in read_gates(broken)] == [0, 2]


@pytest.mark.slow
def test_no_gates_no_file(parts: TinyParts, tmp_path: Path) -> None:
    train(make_config(parts, tmp_path, language_layers=[], max_steps=1, save_steps=0))
    assert not (tmp_path / FILE).exists()
    assert read_gates(tmp_path) == []


def test_only_the_main_process_writes_and_only_while_training(tmp_path: Path) -> None:

    model = SimpleNamespace(cross_attention=[GatedCrossAttention(gate=0.25)])
    arguments = SimpleNamespace(output_dir=str(tmp_path))

    def state(step: int, main: bool = True) -> SimpleNamespace:
        return SimpleNamespace(global_step=step, is_world_process_zero=main)

    other = GateHistory()
    other.on_train_begin(arguments, state(0, main=False), None, model=model)
    other.on_log(arguments, state(1, main=False), None, model=model)
    main = GateHistory()
    main.on_log(arguments, state(0), None, model=model)  # the loss before training is logged before it begins
    assert not (tmp_path / FILE).exists()
    main.on_train_begin(arguments, state(0), None, model=model)
    for step in (0, 1, 1):
        main.on_log(arguments, state(step), None, model=model)
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert lines == [{"step": 0, "gates": [0.25]}, {"step": 1, "gates": [0.25]}]


def test_a_damaged_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What can be read is; a line cut off by the end of its process needs no word."""
    good = b'{"step": 1, "gates": [0.5]}\n'
    (tmp_path / FILE).write_bytes(good + b'{"step": 2, "ga')
    assert read_gates(tmp_path) == [{"step": 1, "gates": [0.5]}]
    assert not caplog.records
    damage = [
        b"a\xff", b"[" * 100_000, b'{"step": Infinity, "gates": []}', b'{"step": 2, "gates": [1%s]}' % (b"0" * 400),
        b'{"step": 1%s, "gates": []}' % (b"0" * 5000), b"[]", b'{"step": 2, "gates": 5}', b"null\0",
    ]  # fmt: skip
    for line in damage:
        (tmp_path / FILE).write_bytes(line + b"\n" + good)
        caplog.clear()
        assert read_gates(tmp_path) == [{"step": 1, "gates": [0.5]}]
        assert "gates.jsonl: line 1 and 0 more are damaged, skipped" in caplog.text
    (tmp_path / FILE).write_bytes(b"\x1f\x8b" + good)
    assert read_gates(tmp_path) == []
    assert "gates.jsonl: cannot be read" in caplog.text
    (tmp_path / FILE).unlink()
    os.mkfifo(tmp_path / FILE)
    assert read_gates(tmp_path) == []
