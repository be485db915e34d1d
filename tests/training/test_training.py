"""Training on transformers' Trainer: real runs of a few steps with tiny models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_training import TinyParts, save_parts
from tiny_training import training_config as make_config
from transformers import TrainerCallback

from layalign import LayAlignForCausalLM
from layalign.modeling.tokenization import load_tokenizers
from layalign.training import TrainSummary, build_model, load_train_config, train, training_arguments
from layalign.training.checkpoints import checkpoints
from layalign.training.trainer import LengthBucketSampler, load_trained
from layalign.utils.errors import ArgumentError, CheckpointError


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    return save_parts(tmp_path_factory.mktemp("parts"))


def losses(summary: TrainSummary) -> list[float]:
    return [entry["loss"] for entry in summary.log_history if "loss" in entry]


class StopAfter(TrainerCallback):
    """Ends a run in its middle, as a killed process would, after the step's checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.step:
            control.should_training_stop = True


class Recorder(TrainerCallback):
    """Keeps what the Trainer built."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.args, self.optimizer, self.scheduler = args, kwargs["optimizer"], kwargs["lr_scheduler"]
        self.defaults = [dict(group, params=len(group["params"])) for group in self.optimizer.param_groups]


def test_loss_falls_and_only_published_parts_change(parts: TinyParts, tmp_path: Path) -> None:
    config = make_config(parts, tmp_path, max_steps=25)
    model = build_model(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    summary = train(config, model=model)
    assert summary.loss_after < summary.loss_before - 0.1
    assert summary.steps == 25
    assert (summary.train_examples, summary.dev_examples) == (40, 8)
    own = ("mapping.", "encoder_aligner.", "cross_attention.")
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.startswith(own)}
    assert summary.trained_parameters == sum(before[name].numel() for name in changed)


def test_what_a_run_leaves_behind(
    parts: TinyParts, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    config = make_config(parts, tmp_path, report_to=["tensorboard"], save_steps=3)
    model = build_model(config)
    summary = train(config, model=model)
    again = LayAlignForCausalLM.from_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(again.named_parameters())[name]), name
    assert (tmp_path / "model.safetensors").stat().st_size < 4 * summary.trained_parameters + 20_000
    encoder_tokenizer, llm_tokenizer = load_tokenizers(tmp_path)
    assert encoder_tokenizer("ab").input_ids[-1] == encoder_tokenizer.eos_token_id
    assert llm_tokenizer.decode(llm_tokenizer("mbwa").input_ids) == "mbwa"
    saved = json.loads((tmp_path / "training.json").read_text())
    assert saved["loss_after"] == summary.loss_after
    assert load_train_config(tmp_path / "train_config.yaml") == config
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-6"]
    assert list((tmp_path / "runs").glob("events.out.tfevents*"))
    assert list(elsewhere.iterdir()) == []


def test_published_optimiser_and_schedule(parts: TinyParts, tmp_path: Path) -> None:
    recorder = Recorder()
    config = make_config(parts, tmp_path, learning_rate=None, max_steps=2)
    model = build_model(config)
    train(config, model=model, callbacks=[recorder])
    optimizer = getattr(recorder.optimizer, "optimizer", recorder.optimizer)
    assert isinstance(optimizer, torch.optim.AdamW)
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    decayed = [group for group in recorder.defaults if group["params"]]
    assert [(group["weight_decay"], group["params"]) for group in decayed] == [(3e-7, trained)]
    assert decayed[0]["betas"] == (0.8, 0.999)
    assert decayed[0]["eps"] == 1e-8
    assert decayed[0]["initial_lr"] == 4e-5
    assert recorder.args.max_grad_norm == 1.0
    assert recorder.args.lr_scheduler_type == "cosine"
    assert recorder.args.get_warmup_steps(1000) == 50
    assert recorder.args.num_train_epochs == 3


@pytest.mark.slow
@pytest.mark.parametrize("bucketed", [False, True])
def test_resumed_run_equals_uninterrupted_run(parts: TinyParts, tmp_path: Path, bucketed: bool) -> None:
    # 40 examples in batches of 8: step 7 is in the second epoch.
    changes = {"max_steps": 12, "save_steps": 7, "group_by_length": bucketed}
    whole = train(make_config(parts, tmp_path / "whole", **changes))
    config = make_config(parts, tmp_path / "cut", **changes)
    first = train(config, callbacks=[StopAfter(7)])
    assert first.steps == 7
    second = train(config)
    assert second.resumed_from == str(tmp_path / "cut" / "checkpoint-7")
    assert losses(second) == losses(whole)
    assert len(losses(whole)) == 12
    assert second.loss_before == whole.loss_before
    assert second.loss_after == whole.loss_after


@pytest.mark.slow
def test_interrupted_checkpoint_is_passed_over(parts: TinyParts, tmp_path: Path) -> None:
    config = make_config(parts, tmp_path, max_steps=4, save_steps=2)
    train(config)
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"global_st')
    assert train(config).resumed_from == str(tmp_path / "checkpoint-2")


@pytest.mark.slow
def test_resume_false_starts_over(parts: TinyParts, tmp_path: Path) -> None:
    config = make_config(parts, tmp_path, max_steps=4, save_steps=4)
    first = train(config)
    with pytest.raises(ArgumentError, match="^dev_size: 48 leaves nothing"):  # and nothing is lost
        train(make_config(parts, tmp_path, resume=False, dev_size=48))
    assert len(checkpoints(tmp_path)) == 1
    again = train(make_config(parts, tmp_path, max_steps=4, resume=False))
    assert again.resumed_from is None
    assert checkpoints(tmp_path) == []
    assert losses(again) == losses(first)


@pytest.mark.slow
def test_resume_with_other_settings_is_refused(parts: TinyParts, tmp_path: Path) -> None:
    train(make_config(parts, tmp_path, max_steps=2, save_steps=2))
    with pytest.raises(ArgumentError, match=r"^learning_rate: the run in .* resume=false"):
        train(make_config(parts, tmp_path, max_steps=2, save_steps=2, learning_rate=1e-3))
    with pytest.raises(ArgumentError, match="^resume: expected auto, false or a checkpoint-N folder"):
        train(make_config(parts, tmp_path, resume=str(tmp_path / "checkpoint-9")))


@pytest.mark.slow
def test_accumulation_gives_the_gradient_of_the_published_mean(parts: TinyParts, tmp_path: Path) -> None:
    # A sum instead of a mean over the micro batches would be 8 times as large.
    config = make_config(parts, tmp_path / "whole", max_steps=1, warmup_ratio=0.0, epochs=1)
    whole = train(config)
    halves = train(make_config(parts, tmp_path / "halves", max_steps=1, warmup_ratio=0.0, epochs=1, micro_batch_size=1))
    norms = [next(e["grad_norm"] for e in run.log_history if "grad_norm" in e) for run in (whole, halves)]
    assert norms[1] == pytest.approx(norms[0], rel=0.2)
    assert losses(halves)[0] == pytest.approx(losses(whole)[0], rel=0.05)


@pytest.mark.slow
def test_task_stage_starts_from_translation(parts: TinyParts, tmp_path: Path) -> None:
    first = make_config(parts, tmp_path / "translation")
    train(first)
    second = make_config(
        parts, tmp_path / "task", stage="task", task="math", init_checkpoint=str(tmp_path / "translation"), dev_size=4
    )
    start = build_model(second)
    stored = LayAlignForCausalLM.from_pretrained(tmp_path / "translation").state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in start.state_dict().items())
    summary = train(second)
    assert summary.loss_after < summary.loss_before
    with pytest.raises(ArgumentError, match="^encoder_layers: init_checkpoint"):
        build_model(make_config(parts, tmp_path / "x", init_checkpoint=str(tmp_path / "task"), encoder_layers=[1]))


@pytest.mark.slow
def test_lora_trains_reloads_and_resumes(parts: TinyParts, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    changes = {"lora": {"r": 2}, "max_steps": 4, "save_steps": 2}
    config = make_config(parts, tmp_path / "whole", **changes)
    model = build_model(config)
    names = [name for name, parameter in model.named_parameters() if "lora_" in name and parameter.requires_grad]
    assert names
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = train(config, model=model)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert set(names) <= changed
    assert not {name for name in changed if name.startswith(("encoder.", "llm.")) and "lora_" not in name}
    again = LayAlignForCausalLM.from_pretrained(tmp_path / "whole")
    assert again.config.lora["r"] == 2
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    cut = make_config(parts, tmp_path / "cut", **changes)
    train(cut, callbacks=[StopAfter(2)])
    assert losses(train(cut)) == losses(whole)


@pytest.mark.slow
def test_lora_joins_in_the_task_stage(parts: TinyParts, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    build_model(make_config(parts, tmp_path)).save_pretrained(tmp_path / "start")
    changes = {"stage": "task", "dev_size": 4, "init_checkpoint": str(tmp_path / "start"), "max_steps": 2}
    summary = train(make_config(parts, tmp_path / "task", lora={"r": 2, "target_modules": ["q_proj"]}, **changes))
    plain = train(make_config(parts, tmp_path / "plain", **changes))
    # 2 layers, q_proj 48 -> 48, rank 2.
    assert summary.trained_parameters - plain.trained_parameters == 2 * 2 * (48 + 48)
    assert summary.loss_before == pytest.approx(plain.loss_before, rel=1e-6)
    changes["init_checkpoint"] = str(tmp_path / "task")
    with pytest.raises(ArgumentError, match="^lora.r: init_checkpoint .* has 2, got 4"):
        build_model(make_config(parts, tmp_path / "x", lora={"r": 4}, **changes))
    with pytest.raises(ArgumentError, match="^lora: .*nowhere"):
        build_model(make_config(parts, tmp_path / "x", lora={"target_modules": ["nowhere"]}))


@pytest.mark.slow
def test_keep_best_puts_the_best_weights_back(parts: TinyParts, tmp_path: Path) -> None:
    class Spoil(TrainerCallback):
        """Makes the weights bad after step 4."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                with torch.no_grad():
                    kwargs["model"].mapping.end_boundary.add_(torch.linspace(-9, 9, 48))
                    kwargs["model"].mapping.mlp.linear2.weight.mul_(-30)

    config = make_config(parts, tmp_path, keep_best=True, eval_steps=2, save_steps=None, max_steps=8)
    summary = train(config, callbacks=[Spoil()])
    during = {entry["step"]: entry["eval_loss"] for entry in summary.log_history[:-1] if "eval_loss" in entry}
    assert list(during) == [0, 2, 4, 6, 8]
    assert min(during, key=lambda step: during[step]) == 4
    assert during[8] > during[4] + 1e-3
    assert summary.loss_after == pytest.approx(during[4], rel=1e-6)


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing_but_memory(parts: TinyParts, tmp_path: Path) -> None:
    plain = train(make_config(parts, tmp_path / "plain", max_steps=3))
    saved = train(make_config(parts, tmp_path / "saved", max_steps=3, gradient_checkpointing=True))
    assert losses(saved) == pytest.approx(losses(plain), rel=1e-5)


@pytest.mark.slow
def test_bf16_trains_fp32_parts_over_bf16_parts(parts: TinyParts, tmp_path: Path) -> None:
    config = make_config(parts, tmp_path, max_steps=25, bf16=True, frozen_dtype="bfloat16")
    model = build_model(config)
    assert model.llm.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    summary = train(config, model=model)
    assert summary.loss_after < summary.loss_before - 0.05


@pytest.mark.slow
def test_adapter_alone_trains(parts: TinyParts, tmp_path: Path) -> None:
    config = make_config(parts, tmp_path, language_layers=[], dev_size=0)
    summary = train(config)
    assert summary.dev_examples == 0
    assert summary.loss_after < summary.loss_before


def test_unfrozen_llm_is_refused(parts: TinyParts, tmp_path: Path) -> None:
    config = make_config(parts, tmp_path)
    model = build_model(config)
    model.llm.requires_grad_(True)
    with pytest.raises(ArgumentError, match="^model: expected encoder and LLM frozen"):
        train(config, model=model)


def test_weights_of_another_shape_are_refused(parts: TinyParts, tmp_path: Path) -> None:
    build_model(make_config(parts, tmp_path)).save_pretrained(tmp_path / "all")
    small = build_model(make_config(parts, tmp_path, language_layers=[0]))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_trained(small, tmp_path / "all")
    with pytest.raises(CheckpointError, match="model.safetensors: cannot be read"):
        load_trained(small, tmp_path / "none")


@pytest.mark.parametrize("seed", [0, 7])
def test_length_buckets(seed: int) -> None:
    lengths = [(index * 37) % 101 for index in range(997)]
    sampler = LengthBucketSampler(lengths, batch_size=8, seed=seed)
    first = list(sampler)
    assert sorted(first) == list(range(len(lengths)))
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    batches = [[lengths[index] for index in first[start : start + 8]] for start in range(0, 992, 8)]
    assert max(max(batch) - min(batch) for batch in batches) < 12
    assert [max(batch) for batch in batches] != sorted(max(batch) for batch in batches)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rat=1", "learning_rat: no such key in a training configuration; did you mean learning_rate?"),
        ("batch_size=many", "batch_size: expected a whole number, got 'many'"),
        ("batch_size=0", "batch_size: expected at least 1, got 0"),
        ("epochs=.nan", "epochs: expected a number, got nan"),
        ("epochs=0", "epochs: expected more than 0, got 0"),
        ("warmup_ratio=1.5", "warmup_ratio: expected at least 0 and below 1, got 1.5"),
        ("stage=third", "stage: expected one of translation, task, got 'third'"),
        ("structure=Cubic", "structure: expected one of Linear, MLP, got 'Cubic'"),
        ("bf16=1", "bf16: expected true, false or auto, got 1"),
        ("progress=no bar", "progress: expected true, false or quiet, got 'no bar'"),
        ("encoder_dropout=much", "encoder_dropout: expected true, false or a rate below 1, got 'much'"),
        ("encoder_dropout=1", "encoder_dropout: expected true, false or a rate below 1, got 1"),
        ("encoder_dropout=-0.1", "encoder_dropout: expected true, false or a rate below 1, got -0.1"),
        ("dev_data=[]", "dev_data: expected a path, FORMAT:PATH, a mapping or a list of these, got []"),
        ("dev_cut=line", "dev_cut: expected one of sentence, position, got 'line'"),
        ("dev_overlap=keep", "dev_overlap: expected one of warn, drop, got 'keep'"),
        ("use_cpu=1", "use_cpu: expected true or false, got 1"),
        ("languages=[1]", "languages: expected a list of names, got [1]"),
        ("encoder_layers=[1, 1]", "encoder_layers: expected distinct numbers from 0 up, got [1, 1]"),
        ("lora.r=0", "lora.r: expected at least 1, got 0"),
        ("lora.rank=2", "lora.rank: expected one of r, lora_alpha, lora_dropout, target_modules"),
        ("lora=yes please", "lora: expected a mapping such as {r: 8, lora_alpha: 16}, got 'yes please'"),
        ("lora.target_modules=[1]", "lora.target_modules: expected a list of names, got [1]"),
        ("resume=3", "resume: expected auto, false or a checkpoint folder, got 3"),
        ("seed", "set: expected key=value, got 'seed'"),
        ("seed=[", "seed: '[' is not a YAML value"),
        ("keep_best=true", None),
    ],
)
def test_configuration_errors_name_the_key(override: str, message: str | None) -> None:
    if message is None:
        assert load_train_config({}, overrides=[override]).keep_best
        return
    with pytest.raises(ArgumentError) as error:
        load_train_config({}, overrides=[override])
    assert str(error.value) == message


def test_keep_best_needs_evaluation() -> None:
    with pytest.raises(ArgumentError, match="^keep_best: expected a dev split"):
        load_train_config({"keep_best": True, "dev_size": 0})
    with pytest.raises(ArgumentError, match="^save_steps: expected that of eval_steps"):
        load_train_config({"keep_best": True, "eval_steps": 10, "save_steps": 20})


def test_configuration_files(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("seed: 3\nstages:\n  task:\n    seed: 4\n    learning_rate: 1e-3\n")
    assert load_train_config(file).seed == 3
    task = load_train_config(file, stage="task", overrides=["languages=German, Swahili", "output_dir=2024"])
    assert (task.seed, task.learning_rate, task.max_source_length) == (4, 1e-3, 512)
    assert task.languages == ["German", "Swahili"]
    assert task.output_dir == "2024"
    with pytest.raises(ArgumentError, match="^config: no such file"):
        load_train_config(tmp_path / "none.yaml")
    for text, message in (
        ("a: [", "is not YAML"),
        ("- 1", "expected a mapping of keys"),
        ("stages: [task]", "^stages:"),
    ):
        file.write_text(text)
        with pytest.raises(ArgumentError, match=message) as error:
            load_train_config(file)
        assert "\n" not in str(error.value)


def test_batch_plan_counts_processes() -> None:
    config = load_train_config({})
    assert config.batch_plan() == (8, 16)
    assert config.batch_plan(8) == (8, 2)
    assert load_train_config({"micro_batch_size": 2}).batch_plan(8) == (2, 8)
    assert load_train_config({"batch_size": 12}).batch_plan() == (6, 2)
    with pytest.raises(ArgumentError, match="^batch_size: expected a multiple of the 3 processes"):
        config.batch_plan(3)
    with pytest.raises(ArgumentError, match="^micro_batch_size: expected a divisor of 16"):
        load_train_config({"micro_batch_size": 3}).batch_plan(8)


def test_nothing_to_train_on(parts: TinyParts, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="^dev_size: 3000 leaves nothing to train on, there are 48 examples"):
        train(make_config(parts, tmp_path, dev_size=3000))
    with pytest.raises(ArgumentError, match="^encoder: expected a folder or hub name"):
        train(make_config(parts, tmp_path, encoder=None))


def test_transformers_refusals_name_the_configuration(tmp_path: Path) -> None:
    config = load_train_config({"lr_scheduler": "zigzag", "output_dir": str(tmp_path)})
    with pytest.raises(ArgumentError, match="^configuration: .*zigzag"):
        training_arguments(config)


def test_saved_configuration_is_plain_yaml(tmp_path: Path) -> None:
    config = load_train_config({"lora": {"r": 4}, "learning_rate": "4e-5"})
    config.save(tmp_path / "c.yaml")
    assert yaml.safe_load((tmp_path / "c.yaml").read_text()) == config.to_dict()
    assert math.isclose(load_train_config(tmp_path / "c.yaml").learning_rate or 0, 4e-5)
