"""The frozen encoder's dropout in training: as published, none, or a rate; in the model, its checkpoints and runs."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ENCODERS, batch, tiny_encoder, tiny_folders, tiny_llm, tiny_model
from tiny_training import TinyParts, save_parts
from tiny_training import training_config as make_config
from torch import nn
from transformers import TrainerCallback

from layalign import LayAlignForCausalLM
from layalign.modeling.configuration import LayAlignConfig
from layalign.modeling.encoders import encoder_part
from layalign.training import build_model, train
from layalign.training.record import FILE
from layalign.utils.errors import ArgumentError

WITHOUT = ("modernbert", "qwen2")  # their configurations have rates of 0


def states(model: LayAlignForCausalLM) -> torch.Tensor:
    """All that the encoder gives for a batch, each call with other random numbers."""
    ids = torch.arange(4, 22).view(2, 9)
    with torch.no_grad():
        return torch.cat(model.encoder(ids, torch.ones_like(ids), output_hidden_states=True).hidden_states)


def varies(model: LayAlignForCausalLM) -> bool:
    return not torch.equal(states(model), states(model))


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder(name: str) -> None:
    model = tiny_model(encoder=name)
    expected = states(model)
    model.train()
    assert varies(model) == (name not in WITHOUT)  # as published
    model.set_encoder_dropout(False)
    assert torch.equal(states(model), expected)
    model.train()  # as the Trainer before each step
    assert torch.equal(states(model), expected) and model.llm.training and model.cross_attention.training
    model.set_encoder_dropout(0.5)
    model.train()
    assert varies(model)
    model.eval()
    assert torch.equal(states(model), expected)
    model.set_encoder_dropout(True)
    assert torch.equal(states(model), expected) and not model.encoder.training  # in eval mode it stays there
    model.train()
    assert varies(model) == (name not in WITHOUT)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_a_rate_takes_the_place_of_all(name: str) -> None:
    model = tiny_model(encoder=name, encoder_dropout=0.9).train()
    rates = [module.p for module in model.encoder.modules() if isinstance(module, nn.Dropout)]
    assert set(rates) <= {0.9}
    own = [module.p for module in encoder_part(tiny_encoder(name)).modules() if isinstance(module, nn.Dropout)]
    model.set_encoder_dropout(True)
    assert [module.p for module in model.encoder.modules() if isinstance(module, nn.Dropout)] == own


def test_a_fresh_model_keeps_the_modes_of_its_parts() -> None:
    model = LayAlignForCausalLM.from_encoder_and_llm(tiny_encoder(), tiny_llm())
    assert not model.encoder.training
    model = LayAlignForCausalLM.from_encoder_and_llm(tiny_encoder().train(), tiny_llm())
    assert model.encoder.training
    model = LayAlignForCausalLM.from_encoder_and_llm(tiny_encoder().train(), tiny_llm(), encoder_dropout=False)
    assert not model.encoder.training


def test_gradients_are_those_without_dropout() -> None:
    losses = []
    for mode in (True, False):
        model = tiny_model(encoder_dropout=False).train(mode)
        loss = model(**batch(model=model)).loss
        loss.backward()
        losses.append((loss.detach(), model.mapping.mlp.linear1.weight.grad))
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("value", [False, 0.25])
def test_it_is_saved_copied_and_replaced(tmp_path: Path, value: bool | float) -> None:
    encoder, llm = tiny_folders(tmp_path)
    model = LayAlignForCausalLM.from_encoder_and_llm(encoder, llm, encoder_dropout=value)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["encoder_dropout"] == value
    for again in (
        LayAlignForCausalLM.from_pretrained(tmp_path / "saved"),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        assert again.config.encoder_dropout == value
        assert varies(again.train()) == (value is not False)
        again.set_encoder_dropout(True)
        assert {m.p for m in again.encoder.modules() if isinstance(m, nn.Dropout)} == {0.1}
    again = LayAlignForCausalLM.from_pretrained(tmp_path / "saved", encoder_dropout=True).train()
    assert varies(again)
    old = json.loads((tmp_path / "saved" / "config.json").read_text())
    del old["encoder_dropout"]
    assert LayAlignConfig.from_dict(old).encoder_dropout is True  # a checkpoint from before the field


@pytest.mark.parametrize("value", ["no", 1, 0, 1.5, -0.1, float("nan"), None])
def test_wrong_values(value: Any) -> None:
    with pytest.raises(ArgumentError, match="^encoder_dropout: expected true, false or a rate above 0 and below 1"):
        LayAlignConfig(encoder_dropout=value)
    model = tiny_model()
    with pytest.raises(ArgumentError, match="^encoder_dropout: expected true, false or a rate above 0 and below 1"):
        model.set_encoder_dropout(value)
    assert model.config.encoder_dropout is True


# Runs


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    """With an encoder that has dropout."""
    found = save_parts(tmp_path_factory.mktemp("parts"))
    file = Path(found.encoder) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dropout_rate": 0.3}))
    return found


class Varies(TrainerCallback):
    """Whether the encoder's states vary within the steps."""

    def __init__(self) -> None:
        self.found: list[bool] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.found.append(varies(model))


@pytest.mark.slow
@pytest.mark.parametrize("value", [None, 0.0, 0.2])
def test_runs_and_what_goes_on_from_them(parts: TinyParts, tmp_path: Path, value: bool | float | None) -> None:
    on, recorded = value is not False and value != 0.0, {None: True, 0.0: False}.get(value, value)  # type: ignore[arg-type]
    changes: dict[str, Any] = {"encoder_dropout": value, "save_steps": 1}
    watch = Varies()
    train(make_config(parts, tmp_path, max_steps=2, **changes), callbacks=[watch])
    assert watch.found == [on, on]
    assert json.loads((tmp_path / FILE).read_text())["settings"]["encoder_dropout"] == recorded
    # Left out, a run keeps it; another value is another run.
    watch = Varies()
    changes["encoder_dropout"] = None
    assert train(make_config(parts, tmp_path, max_steps=3, **changes), callbacks=[watch]).resumed_from
    assert watch.found == [on]
    assert json.loads((tmp_path / "config.json").read_text())["encoder_dropout"] == recorded
    changes["encoder_dropout"] = 0.4
    with pytest.raises(
        ArgumentError, match="^encoder_dropout: the run in .* this one 0.4; set allow_changed=encoder_dropout"
    ):
        train(make_config(parts, tmp_path, max_steps=4, **changes))
    assert train(make_config(parts, tmp_path, max_steps=4, allow_changed=["encoder_dropout"], **changes)).resumed_from


@pytest.mark.slow
def test_a_resumed_run_without_dropout_is_the_uninterrupted_one(parts: TinyParts, tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 2

    def losses(folder: str, value: bool, **callbacks: Any) -> list[float]:
        config = make_config(parts, tmp_path / folder, max_steps=4, encoder_dropout=value, save_steps=2)
        return [entry["loss"] for entry in train(config, **callbacks).log_history if "loss" in entry]

    whole = losses("whole", False)
    assert losses("cut", False, callbacks=[Stop()]) == whole[:2] and losses("cut", False) == whole
    assert whole != losses("with", True)


def test_the_next_stage_has_what_its_checkpoint_has_unless_it_says_so(parts: TinyParts, tmp_path: Path) -> None:
    build_model(make_config(parts, tmp_path, encoder_dropout=False)).save_pretrained(tmp_path / "start")
    start = {"stage": "task", "init_checkpoint": str(tmp_path / "start")}
    assert build_model(make_config(parts, tmp_path, **start)).config.encoder_dropout is False
    assert build_model(make_config(parts, tmp_path, encoder_dropout=True, **start)).config.encoder_dropout is True


@pytest.mark.slow
def test_a_model_in_memory_keeps_its_own(parts: TinyParts, tmp_path: Path) -> None:
    config = make_config(parts, tmp_path, max_steps=1)
    model = build_model(make_config(parts, tmp_path, encoder_dropout=False))
    watch = Varies()
    train(config, model=model, callbacks=[watch])
    assert watch.found == [False]
    assert json.loads((tmp_path / FILE).read_text())["settings"]["encoder_dropout"] is False
    again = train(make_config(parts, tmp_path / "b", max_steps=1, encoder_dropout=True), model=model, callbacks=[watch])
    assert again.steps == 1 and watch.found == [False, True]
