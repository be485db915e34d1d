"""NaN, infinity and loss spikes in training: named, stopped at or left out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import TinyParts, save_parts
from tiny_training import training_config as make_config
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from layalign.training import TrainSummary, build_model, train
from layalign.training.checkpoints import checkpoints
from layalign.training.guard import StepGuard, gradient_norm
from layalign.training.trainer import LayAlignTrainer
from layalign.utils.errors import ArgumentError, NonFiniteError


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    return save_parts(tmp_path_factory.mktemp("parts"))


class Poison(TrainerCallback):
    """Changes what a module puts out, or the gradient of a parameter, in some steps (numbered from 1)."""

    def __init__(self, model: nn.Module, name: str, steps: set[int], change: Callable[[Tensor], Tensor]) -> None:
        self.steps, self.now = steps, False
        self.weights: list[Tensor] = []
        self.rates: list[float] = []

        def changed(value: Any) -> Any:
            if isinstance(value, tuple):
                return (changed(value[0]), *value[1:])
            return change(value) if self.now else value

        self.model = model
        found = dict(model.named_parameters()).get(name)
        if found is not None:
            found.register_hook(changed)
        else:
            model.get_submodule(name).register_forward_hook(lambda module, arguments, output: changed(output))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.now = state.global_step + 1 in self.steps
        self.weights.append(self._flat())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.now = False
        self.rates.append(kwargs["lr_scheduler"].get_last_lr()[0])

    def _flat(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1).clone() for p in self.model.parameters() if p.requires_grad])

    def changed_by(self, step: int) -> bool:
        return not torch.equal(self.weights[step - 1], self.weights[step])


def nan(tensor: Tensor) -> Tensor:
    return tensor * float("nan")


def run(parts: TinyParts, output: Path, name: str, steps: set[int], change: Any = nan, **changes: Any) -> Any:
    config = make_config(parts, output, **changes)
    model = build_model(config)
    poison = Poison(model, name, steps, change)
    return poison, lambda: train(config, model=model, callbacks=[poison])


@pytest.mark.slow
def test_a_nan_stops_the_run_and_is_named(parts: TinyParts, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    poison, go = run(parts, tmp_path, "llm.model.layers.1.mlp", {5}, save_steps=2)
    with pytest.raises(
        NonFiniteError, match="^step 5: the loss is nan; first not finite: output of llm.model.layers.1"
    ):
        go()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    assert torch.isfinite(poison._flat()).all()


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_gradient_is_named(parts: TinyParts, tmp_path: Path, value: float) -> None:
    name = "mapping.mlp.linear1.weight"
    config = make_config(parts, tmp_path)
    model = build_model(config)
    assert name in dict(model.named_parameters()), [n for n, p in model.named_parameters() if p.requires_grad]
    poison = Poison(model, name, {3}, lambda gradient: gradient.index_fill(0, torch.tensor([1]), value))
    with pytest.raises(NonFiniteError, match=f"^step 3: the loss is [0-9.]+; gradients not finite: {name};"):
        train(config, model=model, callbacks=[poison])


def test_a_broken_weight_is_named(parts: TinyParts, tmp_path: Path) -> None:
    config = make_config(parts, tmp_path)
    model = build_model(config)
    name = "encoder_aligner.projector.fc1.bias"

    class Break(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                model.get_parameter(name).data[0] = float("nan")

    with pytest.raises(NonFiniteError, match=f"^step 2: the loss is nan; weights not finite: {name};"):
        train(config, model=model, callbacks=[Break()])


@pytest.mark.slow
def test_steps_left_out_change_nothing_and_are_counted(
    parts: TinyParts, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    common = {"max_steps": 7, "warmup_ratio": 0.0}  # with warm-up the first step has a learning rate of zero
    poison, go = run(parts, tmp_path, "mapping", {2, 5}, max_skipped_steps=2, micro_batch_size=4, **common)
    clean, clean_go = run(parts, tmp_path / "clean", "mapping", set(), **common)
    summary: TrainSummary = go()
    clean_go()
    assert summary.skipped_steps == [2, 5] and summary.steps == 7
    assert json.loads((tmp_path / "training.json").read_text())["skipped_steps"] == [2, 5]
    assert [poison.changed_by(step) for step in range(1, 7)] == [True, False, True, True, False, True]
    assert poison.rates == clean.rates  # the schedule goes on
    told = [record.message for record in caplog.records if "skipped" in record.message]
    assert "step 2: the loss is nan; first not finite: output of mapping" in told[0]
    assert "the step is skipped, 1 of at most 2" in told[0] and "2 of at most 2" in told[1]
    assert all(math.isfinite(entry["loss"]) for entry in summary.log_history if "loss" in entry)
    assert math.isfinite(summary.loss_after)


@pytest.mark.slow
def test_moments_of_the_optimizer_do_not_see_a_step_left_out(parts: TinyParts, tmp_path: Path) -> None:
    """Leaving the second of two steps out gives the weights of the first alone."""
    kept = {"lr_scheduler": "constant", "warmup_ratio": 0.0, "max_skipped_steps": 3}
    poison, go = run(parts, tmp_path / "a", "llm.lm_head", {2, 3, 4}, max_steps=5, **kept)
    go()
    assert [poison.changed_by(step) for step in range(1, 5)] == [True, False, False, False]
    states: list[Any] = []

    class Optimizer(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            states.extend(kwargs["optimizer"].state_dict()["state"].values())

    config = make_config(parts, tmp_path / "b", max_steps=5, **kept)
    model = build_model(config)
    train(config, model=model, callbacks=[Poison(model, "llm.lm_head", {2, 3, 4}, nan), Optimizer()])
    assert {float(state["step"]) for state in states} == {2.0}
    assert all(torch.isfinite(state["exp_avg"]).all() for state in states)


def test_more_than_the_allowed_steps_stop_the_run(parts: TinyParts, tmp_path: Path) -> None:
    _, go = run(parts, tmp_path, "mapping", {2, 4}, max_skipped_steps=1)
    with pytest.raises(NonFiniteError, match=r"^step 4: .*1 steps were skipped before \(max_skipped_steps 1\)"):
        go()


@pytest.mark.slow
def test_the_count_goes_on_in_a_resumed_run(parts: TinyParts, tmp_path: Path) -> None:
    _, go = run(parts, tmp_path, "mapping", {2, 5}, max_skipped_steps=1, save_steps=3)
    with pytest.raises(NonFiniteError, match="^step 5"):
        go()
    _, again = run(parts, tmp_path, "mapping", {5}, max_skipped_steps=1, save_steps=3)
    with pytest.raises(NonFiniteError, match="^step 5: .*1 steps were skipped before"):
        again()
    _, more = run(parts, tmp_path, "mapping", {5}, max_skipped_steps=2, save_steps=3)
    summary = more()
    assert summary.resumed_from is not None and summary.skipped_steps == [2, 5]


@pytest.mark.slow
def test_a_spike_is_told_and_the_step_taken_or_left_out(
    parts: TinyParts, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(logits: Tensor) -> Tensor:
        return logits * -200

    changes = {"max_steps": 25, "learning_rate": 1e-3}
    poison, go = run(parts, tmp_path / "told", "llm.lm_head", {22}, wrong, **changes)
    summary = go()
    assert summary.loss_spikes == [22] and summary.skipped_steps == [] and poison.changed_by(22)
    (told,) = (record.message for record in caplog.records if "times the median" in record.message)
    assert told.startswith("step 22: the loss ") and "largest gradient: " in told and "(the step is taken)" in told
    name = told.split("largest gradient: ")[1].split(" (")[0]
    assert name in dict(poison.model.named_parameters())

    caplog.clear()
    poison, go = run(parts, tmp_path / "out", "llm.lm_head", {22}, wrong, max_skipped_steps=1, **changes)
    summary = go()
    assert summary.loss_spikes == summary.skipped_steps == [22] and not poison.changed_by(22)

    poison, go = run(parts, tmp_path / "off", "llm.lm_head", {22}, wrong, spike_factor=0, **changes)
    assert go().loss_spikes == []


@pytest.mark.slow
def test_guard_state_after_resume_is_that_of_the_uninterrupted_run(parts: TinyParts, tmp_path: Path) -> None:
    def guard_of(folder: Path) -> Any:
        state = json.loads((checkpoints(folder)[-1] / "trainer_state.json").read_text())
        return state["stateful_callbacks"]["StepGuard"]

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 4

    whole, cut = (make_config(parts, tmp_path / name, save_steps=2, max_steps=8) for name in ("whole", "cut"))
    train(whole)
    train(cut, callbacks=[Stop()])
    train(cut)
    assert guard_of(tmp_path / "whole") == guard_of(tmp_path / "cut")
    assert len(guard_of(tmp_path / "cut")["attributes"]["losses"]) == 8


@pytest.mark.parametrize("before, spikes", [(19, []), (20, [21]), (150, [151])])
def test_a_spike_needs_losses_to_compare_with(before: int, spikes: list[int]) -> None:
    model = nn.Linear(2, 2)
    guard = StepGuard(0, 4.0)
    for step in range(1, before + 2):
        guard.saw(torch.tensor(1.0 if step <= before else 4.1), {})
        guard.check(step, model, lambda number: number, lambda inputs: None)
    assert guard.spikes == spikes and guard.skipped == []
    assert len(guard.losses) == min(before + 1, 100)


class NoFloat64(TorchDispatchMode):
    """A device without float64, as Apple's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        assert not (isinstance(found, Tensor) and found.dtype == torch.float64), f"{func} gives float64"
        return found


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16, torch.float32), (torch.float16,)])
def test_a_step_is_checked_without_float64(dtypes: tuple[torch.dtype, ...]) -> None:
    model, guard = nn.ParameterList(nn.Parameter(torch.ones(2, dtype=dtype)) for dtype in dtypes), StepGuard()
    with NoFloat64():
        assert gradient_norm(model) == 0.0
        for parameter in model:
            parameter.grad = torch.full_like(parameter, 3.0)
        guard.saw(torch.tensor(1.5, dtype=dtypes[0]), {})
        guard.check(1, model, lambda number: number, None)
        assert float(gradient_norm(model)) == pytest.approx(math.sqrt(18 * len(dtypes)), rel=1e-2)
    assert list(guard.losses) == [1.5]


def test_gradient_norm_of_many_parameters_in_mixed_dtypes() -> None:
    model = nn.ParameterDict({f"p{i}": nn.Parameter(torch.randn(3, i + 1)) for i in range(4)})
    assert gradient_norm(model) == 0.0
    for parameter in model.values():
        parameter.grad = torch.randn_like(parameter)
    exact = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.values() if p.grad is not None))
    assert gradient_norm(model) == pytest.approx(exact, rel=1e-6)
    model["p2"].grad[0, 0] = float("nan")  # type: ignore[index]
    assert math.isnan(gradient_norm(model))


@pytest.mark.parametrize(
    "changes, name", [({"spike_factor": 0.5}, "spike_factor"), ({"max_skipped_steps": -1}, "max_sk")]
)
def test_settings_are_checked(parts: TinyParts, tmp_path: Path, changes: dict[str, Any], name: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{name}"):
        make_config(parts, tmp_path, **changes)


def test_deepspeed_cannot_leave_steps_out(parts: TinyParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayAlignTrainer, "sharding", "ZeRO-2")
    with pytest.raises(ArgumentError, match="^max_skipped_steps: expected 0 with DeepSpeed"):
        train(make_config(parts, tmp_path, max_skipped_steps=1))


@pytest.mark.slow
def test_no_false_alarm_in_a_normal_run(parts: TinyParts, tmp_path: Path) -> None:
    config = make_config(parts, tmp_path, max_steps=40)
    assert config.spike_factor > 1
    summary = train(config)
    assert summary.skipped_steps == summary.loss_spikes == []
