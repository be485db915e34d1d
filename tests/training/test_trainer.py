"""transformers' own Trainer: what it decides by a model's name and signature is right for ours, as for the bare LLM."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_encoder, tiny_llm, tiny_model
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from layalign import LayAlignForCausalLM
from layalign.utils.errors import ArgumentError

Row = dict[str, list[int]]
# Sources, prompts and targets of unequal lengths: a label counts the same wherever it stands.
ROWS: list[Row] = [
    {"source": [5, 6, 7], "prompt": [9], "target": [8, 4, 7, 2]}, {"source": [8, 9], "prompt": [], "target": [5]},
    {"source": [4, 5, 6, 7], "prompt": [6, 6, 4], "target": [7, 6]},
    {"source": [10], "prompt": [11], "target": [3, 9, 9]},
]  # fmt: skip


class Renamed(LayAlignForCausalLM):
    """A user's own subclass."""


def like_the_bare_llm(cls: type = LayAlignForCausalLM) -> LayAlignForCausalLM:
    """Zero gates and no soft tokens: the source adds nothing."""
    torch.manual_seed(2)
    return cls.from_encoder_and_llm(tiny_encoder(dropout_rate=0.0), tiny_llm(), use_adapter=False)


class Collator:
    """Batches of rows for a model, packed as it wants them; without sources for the bare LLM."""

    def __init__(self, model: LayAlignForCausalLM | None = None, labels: bool = True) -> None:
        self.model, self.labels = model, labels

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        width = max(len(row["source"]) for row in rows)
        mask = torch.tensor([[1] * len(row["source"]) + [0] * (width - len(row["source"])) for row in rows])
        ids = torch.tensor([row["source"] + [0] * (width - len(row["source"])) for row in rows])
        targets = [row["target"] for row in rows] if self.labels else None
        packed = (self.model or SHARED).build_inputs(mask, [row["prompt"] for row in rows], targets)
        return packed if self.model is None else {**packed, "encoder_input_ids": ids, "encoder_attention_mask": mask}


SHARED = like_the_bare_llm()
OWN = ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func", "train_dataset", "eval_dataset")


def trainer(
    model: Any, folder: Path, cls: type[Trainer] = Trainer, collator: Callable[..., Any] | None = None, **options: Any
) -> Trainer:
    own = {name: options.pop(name) for name in tuple(options) if name in (*OWN, "optimizers")}
    arguments = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
        "remove_unused_columns": False, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 2,
        "learning_rate": 0.0, "max_steps": 1, "save_strategy": "no", "seed": 3, **options,
    }  # fmt: skip
    kind = Seq2SeqTrainingArguments if issubclass(cls, Seq2SeqTrainer) else TrainingArguments
    collator = collator or Collator(model if hasattr(model, "encoder") else None)
    data = {"train_dataset": ROWS, "eval_dataset": ROWS, "data_collator": collator}
    return cls(model=model, args=kind(**arguments), **{**data, **own})


def losses(model: Any, folder: Path, **options: Any) -> list[float]:
    used = trainer(model, folder, **options)
    used.train()
    found = [entry["loss"] for entry in used.state.log_history if "loss" in entry]
    return [*found, used.evaluate()["eval_loss"]]


def smoothed(logits: Tensor, labels: Tensor, epsilon: float) -> float:
    logs, targets = logits[:, :-1].double().log_softmax(-1), labels[:, 1:]
    there = targets != -100
    logs, targets = logs[there], targets[there]
    return float(-((1 - epsilon) * logs.gather(1, targets[:, None]).mean() + epsilon * logs.mean()))


# The loss


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "subclass", "peft"])
def test_smoothed_labels_are_shifted(tmp_path: Path, kind: str) -> None:
    model: Any = like_the_bare_llm(Renamed if kind == "subclass" else LayAlignForCausalLM)
    inputs = Collator(model)(ROWS)
    with torch.no_grad():
        wanted = smoothed(model.eval()(**inputs).logits, inputs["labels"], 0.1)
    if kind == "peft":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    options = {"label_smoothing_factor": 0.1, "per_device_eval_batch_size": 4}
    found = losses(model, tmp_path, **options)
    assert found == pytest.approx([wanted, wanted], abs=2e-4)
    assert found == pytest.approx(losses(tiny_llm(), tmp_path, **options), abs=2e-4)


def test_a_printed_model_has_its_own_name() -> None:
    assert repr(SHARED).startswith("LayAlignForCausalLM(\n") and "(llm): LlamaForCausalLM(\n" in repr(SHARED)
    assert repr(nn.Sequential(like_the_bare_llm(Renamed))).startswith("Sequential(\n  (0): Renamed(\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {}, {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
        {"train_sampling_strategy": "group_by_length"},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "label_smoothing_factor": 0.2},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"neftune_noise_alpha": 5.0},
    ],
    ids=lambda options: "-".join(options) or "plain",
)  # fmt: skip
def test_losses_are_those_of_the_bare_llm(tmp_path: Path, options: dict[str, Any]) -> None:
    if "train_sampling_strategy" in options:
        if "train_sampling_strategy" not in TrainingArguments.__dataclass_fields__:
            options = {"group_by_length": True}
        rows = [{**row, "input_ids": row["target"]} for row in ROWS]
        options = {**options, "train_dataset": rows, "eval_dataset": rows}
    torch.manual_seed(0)
    ours = losses(like_the_bare_llm(), tmp_path, **options)
    torch.manual_seed(0)
    assert ours == pytest.approx(losses(tiny_llm(), tmp_path, **options), abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("cls", [LayAlignForCausalLM, Renamed])
def test_accumulated_unequal_batches_step_as_one_big_batch(tmp_path: Path, cls: type) -> None:
    def step(**options: Any) -> dict[str, Tensor]:
        torch.manual_seed(2)
        model = cls.from_encoder_and_llm(tiny_encoder(dropout_rate=0.0), tiny_llm())
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        used = trainer(
            model, tmp_path, learning_rate=1.0, lr_scheduler_type="constant", optimizers=(optimizer, None), **options
        )
        used.train()
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    whole = step()
    parts = step(gradient_accumulation_steps=4, per_device_train_batch_size=1)
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_labels_that_nothing_predicts_are_not_counted(tmp_path: Path) -> None:
    def first_labelled(rows: list[Row]) -> dict[str, Tensor]:
        found = Collator(SHARED)(rows)
        found["labels"] = found["input_ids"].masked_fill(found["attention_mask"] == 0, -100)
        return found

    def bare(rows: list[Row]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in first_labelled(rows).items() if not name.startswith("encoder")}

    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    ours = losses(like_the_bare_llm(Renamed), tmp_path, collator=first_labelled, **options)
    assert ours == pytest.approx(losses(tiny_llm(), tmp_path, collator=bare, **options), abs=2e-4)


@pytest.mark.slow
def test_a_users_own_loss_gets_logits_and_labels(tmp_path: Path) -> None:
    def twice(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        targets = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
        return 2 * F.cross_entropy(outputs.logits.flatten(0, 1), targets, ignore_index=-100)

    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            outputs = model(**inputs, logits_to_keep=0)
            loss = twice(outputs, inputs["labels"])
            return (loss, outputs) if return_outputs else loss

    once = losses(like_the_bare_llm(), tmp_path, per_device_eval_batch_size=4)
    for options in ({"compute_loss_func": twice}, {"cls": Own}):
        found = losses(like_the_bare_llm(), tmp_path, per_device_eval_batch_size=4, **options)
        assert found == pytest.approx([2 * loss for loss in once], abs=2e-4)


# Evaluation


def evaluated(model: Any, folder: Path, **options: Any) -> tuple[dict[str, float], list[Any]]:
    seen: list[Any] = []

    def compute(found: Any) -> dict[str, float]:
        seen.append(found)
        right = found.predictions[..., :-1, :].argmax(-1) if found.predictions.ndim == 3 else found.predictions[:, :-1]
        there = found.label_ids[:, 1:] != -100
        return {"accuracy": float((right == found.label_ids[:, 1:])[there].mean())}

    return trainer(model, folder, compute_metrics=compute, **options).evaluate(), seen


@pytest.mark.parametrize(
    "options",
    [
        {}, {"eval_accumulation_steps": 1}, {"label_smoothing_factor": 0.1},
        {"include_for_metrics": ["inputs", "loss"]},
        {"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)},
    ],
    ids=lambda options: "-".join(options) or "plain",
)  # fmt: skip
def test_metrics_get_what_they_get_from_the_bare_llm(tmp_path: Path, options: dict[str, Any]) -> None:
    (found, (ours,)), (wanted, (bare,)) = (
        evaluated(model, tmp_path, **options) for model in (like_the_bare_llm(), tiny_llm())
    )
    np.testing.assert_allclose(ours.predictions, bare.predictions, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(ours.label_ids, bare.label_ids)
    assert found["eval_accuracy"] == wanted["eval_accuracy"]
    assert found["eval_loss"] == pytest.approx(wanted["eval_loss"], abs=1e-5)
    for part in ("inputs", "losses") if "include_for_metrics" in options else ():
        np.testing.assert_allclose(getattr(ours, part), getattr(bare, part), atol=1e-5)


def test_predict_gives_logits_loss_and_labels(tmp_path: Path) -> None:
    model = tiny_model()
    inputs = Collator(model)(ROWS)
    found = trainer(model, tmp_path, collator=Collator(model), per_device_eval_batch_size=4).predict(ROWS)
    with torch.no_grad():
        output = model(**inputs)
        full = model(**{name: tensor for name, tensor in inputs.items() if name != "labels"}).logits
    np.testing.assert_allclose(found.predictions, full.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.label_ids, inputs["labels"].numpy())
    assert found.metrics["test_loss"] == pytest.approx(float(output.loss), abs=1e-5)


@pytest.mark.parametrize("labels", [False, True])
def test_predictions_may_be_generated(tmp_path: Path, labels: bool) -> None:
    model = tiny_model()
    collator = Collator(model, labels)
    used = trainer(
        model, tmp_path, Seq2SeqTrainer, collator, predict_with_generate=True, per_device_eval_batch_size=4,
        generation_max_length=24,
    )  # fmt: skip
    found, inputs = used.predict(ROWS), collator(ROWS)
    given = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    wanted = model.generate(**given, max_length=24).numpy()
    np.testing.assert_array_equal(found.predictions[:, : wanted.shape[1]], wanted)
    if labels:
        with torch.no_grad():
            assert found.metrics["test_loss"] == pytest.approx(float(model(**inputs).loss), abs=1e-5)


def test_logits_are_made_where_somebody_wants_them(tmp_path: Path) -> None:
    """Eight labels: in training, with gradients, and in the dev loss of our own trainer nothing else is computed."""
    from layalign.training.trainer import LayAlignTrainer

    model = tiny_model()
    inputs, seen = Collator(model)(ROWS), []
    model.llm.lm_head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape[:2])))
    whole, labelled = tuple(inputs["input_ids"].shape), (1, 10)
    assert model.train()(**inputs).logits is None and model.eval()(**inputs).logits is None
    with torch.no_grad():
        assert model(**inputs, skip_logits=True).logits is None
        assert model.train()(**inputs).logits is None
        assert model.eval()(**inputs).logits.shape == (*whole, 64)
        losses = [model(**inputs, skip_logits=skip).loss for skip in (True, False)]
    assert model(**inputs, skip_logits=False).logits.shape == (*whole, 64)
    assert seen == [labelled] * 4 + [whole, labelled, whole, whole]
    torch.testing.assert_close(*losses)
    seen.clear()
    own = {"tokenizers": (None, None), "model": model, "data_collator": Collator(model), "eval_dataset": ROWS}
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, remove_unused_columns=False
    )
    loss = LayAlignTrainer(**own, args=arguments).evaluate()["eval_loss"]
    assert seen == [labelled] and loss == pytest.approx(float(losses[0]), abs=1e-5)
    with pytest.raises(ArgumentError, match="compute_metrics: expected None"):
        LayAlignTrainer(**own, args=arguments, compute_metrics=print)


# Data, weights


def test_only_columns_that_the_model_takes_are_kept(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    row = {name: tensor[0].tolist() for name, tensor in Collator(SHARED)(ROWS[:1]).items()}
    table = datasets.Dataset.from_list([{**row, "text": "a", "id": 3}] * 2)
    found: list[list[str]] = []

    def stacked(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        found.append(sorted(rows[0]))
        return {name: torch.tensor([row[name] for row in rows]) for name in row}

    used = trainer(
        like_the_bare_llm(),
        tmp_path,
        collator=stacked,
        remove_unused_columns=True,
        train_dataset=table,
        eval_dataset=table,
    )
    used.train()
    used.evaluate()
    assert found == [sorted(row)] * 2


def test_tokens_are_counted_as_those_of_the_bare_llm(tmp_path: Path) -> None:
    counts = []
    for model in (like_the_bare_llm(), tiny_llm()):
        used = trainer(model, tmp_path, include_num_input_tokens_seen="all")
        used.train()
        counts.append(used.state.num_input_tokens_seen)
    assert counts[0] == counts[1] > 0


@pytest.mark.slow
def test_resuming_and_the_best_model_load_the_trained_weights_quietly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_encoder().save_pretrained(tmp_path / "encoder")
    tiny_llm().save_pretrained(tmp_path / "llm")

    def named() -> LayAlignForCausalLM:
        torch.manual_seed(2)
        return LayAlignForCausalLM.from_encoder_and_llm(str(tmp_path / "encoder"), str(tmp_path / "llm"))

    options = {
        "learning_rate": 0.1, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "save_only_model": False, "lr_scheduler_type": "constant",
    }  # fmt: skip
    whole = trainer(named(), tmp_path / "whole", max_steps=2, **options)
    whole.train()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.clear()
    resumed = trainer(named(), tmp_path / "again", max_steps=2, load_best_model_at_end=True, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-1"))
    assert "missing" not in caplog.text
    saved = LayAlignForCausalLM.from_pretrained(Path(resumed.state.best_model_checkpoint or "")).state_dict()
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, saved[name]), name
    last = LayAlignForCausalLM.from_pretrained(tmp_path / "whole/checkpoint-2").state_dict()
    again = LayAlignForCausalLM.from_pretrained(tmp_path / "again/checkpoint-2").state_dict()
    assert all(torch.equal(weight, last[name]) for name, weight in again.items())


def test_what_is_really_missing_is_still_told() -> None:
    model = tiny_model()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert model.load_state_dict(trained, strict=False).missing_keys == []
    gate = next(name for name in trained if name.endswith("adaption_gate"))
    partial = {name: p for name, p in trained.items() if name != gate}
    assert model.load_state_dict(partial, strict=False).missing_keys == [gate]
    whole = {name: p for name, p in model.state_dict().items() if name != "llm.lm_head.weight"}
    assert model.load_state_dict(whole, strict=False).missing_keys == ["llm.lm_head.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(trained)
