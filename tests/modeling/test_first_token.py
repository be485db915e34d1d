"""The first token of the LLM's input: as its tokenizer has it, as asked for, as stored; never twice."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_encoder, tiny_llm, tiny_model
from tiny_training import TinyParts, byte_tokenizer, save_parts, training_config, without_record
from tokenizers import processors

from layalign import ArgumentError, LayAlignConfig, LayAlignForCausalLM
from layalign.data import Example, LayAlignCollator
from layalign.training import TrainConfig, build_model, load_train_config, train

BOS = 2  # of the tiny parts


def _with_bos() -> Any:
    tokenizer = byte_tokenizer(add_eos=False)
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    return save_parts(tmp_path_factory.mktemp("parts"))


@pytest.mark.parametrize(("given", "first"), [("own", 1), (None, None), (False, None), (7, 7), (0, 0)])
def test_what_is_given_is_what_stands_first_and_is_stored(given: Any, first: int | None, tmp_path: Path) -> None:
    model = tiny_model(llm="qwen2", llm_bos_token_id=given)
    source = {"encoder_input_ids": torch.tensor([[5, 6, 7]])}
    packed = model.build_inputs(torch.ones(1, 3), [[9]])["input_ids"][0].tolist()
    assert packed == ([] if first is None else [first]) + [0] * 4 + [9]
    model.save_pretrained(tmp_path, save_frozen=True)
    stored = json.loads((tmp_path / "config.json").read_text())["llm_bos_token_id"]
    assert stored is False if first is None else stored == first
    loaded = LayAlignForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.llm_bos_token_id == first == LayAlignConfig.from_pretrained(tmp_path).llm_bos_token_id
    expected = model.generate(**source, max_new_tokens=3, do_sample=False)
    assert torch.equal(loaded.generate(**source, max_new_tokens=3, do_sample=False), expected)


def test_older_checkpoints_and_other_values() -> None:
    parts = {"encoder_config": tiny_encoder().config, "llm_config": tiny_llm().config}
    written = LayAlignConfig(**parts).to_dict()
    assert written["llm_bos_token_id"] == 1
    assert LayAlignConfig.from_dict({**written, "llm_bos_token_id": None}).llm_bos_token_id is None
    del written["llm_bos_token_id"]
    assert LayAlignConfig.from_dict(written).llm_bos_token_id == 1
    for wrong in (True, -1, "none", 64):
        with pytest.raises(ArgumentError, match="llm_bos_token_id"):
            LayAlignConfig(**parts, llm_bos_token_id=wrong)


@pytest.mark.parametrize(("text", "value"), [("false", False), ("7", 7), ("null", None)])
def test_training_settings_take_it(text: str, value: Any) -> None:
    config = load_train_config({}, overrides=[f"llm_bos_token_id={text}"])
    assert config.llm_bos_token_id is value or config.llm_bos_token_id == value != False  # noqa: E712
    assert load_train_config(config.to_dict()) == config


@pytest.mark.parametrize("wrong", [True, "yes", -1, 1.5])
def test_training_settings_refuse_other_values(wrong: Any) -> None:
    with pytest.raises(ArgumentError, match="llm_bos_token_id"):
        TrainConfig(llm_bos_token_id=wrong)


def test_a_fresh_model_follows_the_llms_tokenizer(parts: TinyParts, tmp_path: Path) -> None:
    assert build_model(training_config(parts, tmp_path)).config.llm_bos_token_id is None
    assert build_model(training_config(parts, tmp_path, llm_bos_token_id=BOS)).config.llm_bos_token_id == BOS
    other = save_parts(tmp_path / "parts")
    _with_bos().save_pretrained(other.llm)
    assert build_model(training_config(other, tmp_path)).config.llm_bos_token_id == BOS
    assert build_model(training_config(other, tmp_path, llm_bos_token_id=False)).config.llm_bos_token_id is None
    for file in Path(other.llm).glob("tokenizer*"):
        file.unlink()
    assert build_model(training_config(other, tmp_path)).config.llm_bos_token_id == BOS  # the configuration's


@pytest.mark.slow
def test_a_run_keeps_what_it_began_with_and_says_what_differs(
    parts: TinyParts, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="layalign")
    settings: dict[str, Any] = {"max_steps": 1, "dev_size": 0, "save_steps": 1}
    old = training_config(parts, tmp_path / "run", llm_bos_token_id=BOS, **settings)
    train(old)
    assert "llm_bos_token_id" not in caplog.text  # it was asked for
    lines = [line for line in _settings_file(tmp_path / "run").read_text().splitlines() if "llm_bos" not in line]
    without_record(tmp_path / "run")
    _settings_file(tmp_path / "run").write_text("\n".join(lines) + "\n")  # as a version without the setting wrote it
    config = training_config(parts, tmp_path / "run", **settings)
    assert train(config).resumed_from is not None
    assert LayAlignConfig.from_pretrained(tmp_path / "run").llm_bos_token_id == BOS
    assert "the LLM's input begins with 2, but its tokenizer adds none" in caplog.text
    caplog.clear()
    start = {**settings, "init_checkpoint": str(tmp_path / "run")}
    train(training_config(parts, tmp_path / "next", **start))
    assert "the LLM's input begins with 2" in caplog.text
    with pytest.raises(ArgumentError, match="llm_bos_token_id: init_checkpoint .* has 2, got False"):
        build_model(training_config(parts, tmp_path / "other", llm_bos_token_id=False, **start))
    caplog.clear()
    train(training_config(parts, tmp_path / "fresh", **settings))
    assert "no first token, as the LLM's tokenizer adds none." in caplog.text
    assert "Set it to a token's number (2 in the LLM's configuration), or to false" in caplog.text


def _settings_file(folder: Path) -> Path:
    return next(folder.glob("*.yaml"))


def test_a_tokenizer_that_adds_one_itself_doubles_none() -> None:
    model = tiny_model(llm_bos_token_id=BOS)
    collator = LayAlignCollator.from_model(model, byte_tokenizer(add_eos=True), _with_bos(), stage="task")
    example = Example(source="ab", target="cd", language="German", prompt="ef")
    ids = collator([example])["input_ids"][0].tolist()
    assert ids.count(BOS) == 1 and ids[0] == BOS
