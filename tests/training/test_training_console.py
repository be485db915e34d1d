"""What a run says on the console: plain lines, and a warning where it cannot get anywhere."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny_training import TinyParts, save_parts
from tiny_training import training_config as make_config
from transformers import get_scheduler

from layalign.cli import main
from layalign.nn import GatedCrossAttention
from layalign.training import train
from layalign.training.advice import LEAST_SUM, SmallRun, summed_rates

LOSS = re.compile(
    r"step (\d+)/6: loss \d\.\d+, learning rate [\d.e-]+(, gates [\d.e-]+)?, [\d.]+ examples/s, \d:\d\d:\d\d left"
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    return save_parts(tmp_path_factory.mktemp("parts"))


# Plain lines


@pytest.mark.slow
def test_a_line_for_each_logging_step_and_evaluation(
    parts: TinyParts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = train(make_config(parts, tmp_path, logging_steps=2, eval_steps=3))
    lines = capsys.readouterr().out.splitlines()
    losses = [line for line in lines if (LOSS.fullmatch(line))]
    assert [line.split(":")[0] for line in losses] == ["step 2/6", "step 4/6", "step 6/6"]
    assert all(", gates " in line for line in losses) and losses[-1].endswith("0:00:00 left")
    evaluations = [line for line in lines if line not in losses]
    found = {entry["step"]: entry["eval_loss"] for entry in summary.log_history if "eval_loss" in entry}
    expected = [f"step {step}/6: dev loss {loss:.4f}" for step, loss in found.items()]
    assert evaluations == [expected[0].replace("/6", ""), *expected[1:]]
    logged = [entry["loss"] for entry in summary.log_history if "loss" in entry]
    assert [float(line.split("loss ")[1].split(",")[0]) for line in losses] == pytest.approx(logged, rel=1e-3)


@pytest.mark.slow
def test_without_dev_examples_and_without_gates(
    parts: TinyParts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(make_config(parts, tmp_path, dev_size=0, language_layers=[], logging_steps=6))
    first, loss, last = capsys.readouterr().out.splitlines()
    assert first.startswith("step 0: loss of some training examples ") and "gates" not in loss and LOSS.fullmatch(loss)
    assert last.startswith("step 6/6: loss of some training examples ")


@pytest.mark.slow
@pytest.mark.parametrize("progress", [True, "quiet"])
def test_nothing_double_beside_the_bar_and_nothing_where_quiet(
    parts: TinyParts, tmp_path: Path, capsys: pytest.CaptureFixture[str], progress: bool | str
) -> None:
    train(make_config(parts, tmp_path, progress=progress, max_steps=2))
    captured = capsys.readouterr()
    assert "step 1/2" not in captured.out and "dev loss" not in captured.out
    assert ("| 2/2 [" in captured.err) == (progress is True)
    assert (captured.out.count("'loss'") > 0) == (progress is True)


@pytest.mark.slow
def test_a_resumed_run_counts_its_own_steps(
    parts: TinyParts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(make_config(parts, tmp_path, max_steps=5, save_steps=5))
    capsys.readouterr()
    train(make_config(parts, tmp_path, max_steps=6, save_steps=5))
    lines = capsys.readouterr().out.splitlines()
    assert LOSS.fullmatch(lines[0]) and lines[0].startswith("step 6/6: ") and lines[1].startswith("step 6/6: dev loss")
    assert len(lines) == 2


def test_the_command_says_where_it_writes_and_what_precision(
    parts: TinyParts, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    values = {**make_config(parts, tmp_path, max_steps=1).to_dict(), "bf16": "auto"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", str(tmp_path / "c.yaml"), "--output", str(tmp_path / "run")])
    captured = capsys.readouterr()
    assert stop.value.code == 0
    assert "step 1/1: loss" in captured.out
    said = [record.message for record in caplog.records if record.levelname == "INFO"]
    assert f"translation: writes to {tmp_path / 'run'}" in said
    assert any(line.startswith("bf16: ") for line in said)


# Small runs


def scheduler(name: str, rate: float, steps: int, warmup: float = 0.05) -> torch.optim.lr_scheduler.LRScheduler:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    return get_scheduler(name, optimizer, int(warmup * steps), steps)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "constant_with_warmup"])
def test_summed_rates_are_those_of_the_schedule(name: str) -> None:
    one, other = scheduler(name, 2e-3, 40), scheduler(name, 2e-3, 40)
    expected = 0.0
    for _ in range(40):
        expected += one.get_last_lr()[0]
        one.optimizer.step()
        one.step()
    assert summed_rates(other, 40) == pytest.approx(expected, rel=1e-9)
    assert summed_rates(SimpleNamespace(scheduler=other), 40) == pytest.approx(expected, rel=1e-9)


def test_the_sum_bounds_what_adam_moves_a_gate() -> None:
    gate = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([gate], lr=4e-5, betas=(0.8, 0.999), weight_decay=3e-7)
    schedule = get_scheduler("cosine", optimizer, 40, 800)
    bound = summed_rates(schedule, 800)
    for _ in range(800):
        optimizer.zero_grad()
        (-3.0 * gate).sum().backward()  # always the same way: as far as it can get
        optimizer.step()
        schedule.step()
    assert 0.99 * bound < gate.item() <= bound * (1 + 1e-4)


@pytest.mark.parametrize(
    ("rate", "steps", "gates", "told"),
    [
        (4e-5, 800, 0.0, True),
        (1e-3, 800, 0.0, False),
        (4e-5, 21024, 0.0, False),  # the published translation stage
        (3e-5, 807, 0.1, False),  # a task stage, whose gates are open already
        (4e-5, 800, None, False),  # no gates
    ],
)
def test_a_warning_where_the_gates_cannot_open(
    rate: float, steps: int, gates: float | None, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    layers = [] if gates is None else [GatedCrossAttention(gate=gates)]
    model = SimpleNamespace(cross_attention=layers)
    state = SimpleNamespace(global_step=0, max_steps=steps, is_world_process_zero=True)
    SmallRun().on_train_begin(None, state, None, model=model, lr_scheduler=scheduler("cosine", rate, steps))
    assert ("raise learning_rate" in caplog.text) == told
    caplog.clear()
    state.global_step = 5  # a run that goes on was told
    SmallRun().on_train_begin(None, state, None, model=model, lr_scheduler=scheduler("cosine", rate, steps))
    assert caplog.text == ""


@pytest.mark.slow
def test_a_run_is_warned(parts: TinyParts, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(make_config(parts, tmp_path / "small", max_steps=2, learning_rate=4e-5))
    assert "learning_rate: the rates of this schedule sum to 4e-05 over 2 steps" in caplog.text
    caplog.clear()
    train(make_config(parts, tmp_path / "large", max_steps=4, learning_rate=2 * LEAST_SUM))
    assert "learning_rate" not in caplog.text
