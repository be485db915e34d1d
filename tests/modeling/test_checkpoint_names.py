"""Where a checkpoint looks for its frozen parts: the same place from every working directory, and never by chance."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from tiny import logits, named_model, open_gates, tiny_encoder, tiny_llm
from tiny_training import byte_tokenizer, save_parts, training_config
from transformers import AutoModelForCausalLM, PreTrainedModel

from layalign import CheckpointError, LayAlignForCausalLM
from layalign.modeling.encoders import load_encoder, load_llm
from layalign.modeling.loading import load_model
from layalign.modeling.tokenization import load_tokenizers
from layalign.training import train


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the hub; nothing goes out."""
    asked: list[str] = []

    def resolve(host: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(str(host))
        raise socket.gaierror("nobody is there")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return asked


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with models/encoder and models/llm."""
    root = tmp_path / "tree"
    tiny_encoder().save_pretrained(root / "models" / "encoder")
    tiny_llm(num_key_value_heads=2).save_pretrained(root / "models" / "llm")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(root)
    return root


def put_into_cache(model: PreTrainedModel, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model as if it had been downloaded."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    place = folder / f"models--{name.replace('/', '--')}"
    model.save_pretrained(place / "snapshots" / ("0" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)


SPELLINGS = ["models/{}", "./models/{}", "../tree/models/{}", "~/tree/models/{}", "{}", "models/{}/"]


@pytest.mark.slow
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("by", ["name", "model"])
def test_a_path_means_the_same_folder_from_everywhere(
    spelling: str, by: str, tree: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    monkeypatch.setenv("HOME", str(tree.parent))
    if spelling == "{}":
        monkeypatch.chdir("models")
    if by == "model" and spelling.startswith("~"):
        return  # transformers knows no ~
    found: list[Any] = [spelling.format(part) for part in ("encoder", "llm")]
    if by == "model":
        found = [load_encoder(found[0]), AutoModelForCausalLM.from_pretrained(found[1])]
    model = LayAlignForCausalLM.from_encoder_and_llm(*found)
    open_gates(model)
    monkeypatch.chdir(tree)
    model.save_pretrained("out")
    config = json.loads((tree / "out" / "config.json").read_text())
    assert config["encoder_name_or_path"] == str(tree / "models" / "encoder")
    assert config["frozen_folders"] == {"encoder": "../models/encoder", "llm": "../models/llm"}
    for place in (tree, tree.parent, tree.parent / "elsewhere"):
        monkeypatch.chdir(place)
        again = LayAlignForCausalLM.from_pretrained(os.path.relpath(tree / "out"))
        assert torch.equal(logits(again), logits(model))
    assert asked == []


def test_a_tree_may_move(tree: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str]) -> None:
    model = named_model(("models/encoder", "models/llm"))
    model.save_pretrained("runs/out")
    tree.rename(tree.parent / "moved")
    monkeypatch.chdir(tree.parent / "elsewhere")
    again = LayAlignForCausalLM.from_pretrained("../moved/runs/out")
    assert torch.equal(logits(again), logits(model))
    assert again.config.llm_name_or_path == str(tree.parent / "moved" / "models" / "llm")
    again.save_pretrained("out")
    LayAlignForCausalLM.from_pretrained("out")
    assert asked == []


def test_a_folder_that_is_gone_is_named_at_once(tree: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str]) -> None:
    named_model(("models/encoder", "models/llm")).save_pretrained("out")
    shutil.rmtree("models/llm")
    gone = rf"out: the LLM .* cannot be loaded: llm_name_or_path: no such folder: '{tree}/models/llm'"
    for place in (tree, tree.parent):
        monkeypatch.chdir(place)
        with pytest.raises(CheckpointError, match=gone):
            LayAlignForCausalLM.from_pretrained(tree / "out")
        with pytest.raises(CheckpointError, match="no such folder"):
            load_model(str(tree / "out"), "cpu", "auto")
    assert asked == []


@pytest.mark.parametrize("name", ["./llm", "../llm", "/no/llm", "~/no/llm", "a/b/llm", "llm/", "a/llm/", ".", "a\\b"])
def test_what_can_only_be_a_path_is_never_asked_of_the_hub(name: str, tree: Path, asked: list[str]) -> None:
    path = tree / "out" / "config.json"
    named_model(("models/encoder", "models/llm")).save_pretrained("out")
    config = json.loads(path.read_text())
    shutil.rmtree("models/llm")
    for old in (True, False):
        config["llm_name_or_path"] = name
        config["frozen_folders"] = None if old else {}
        path.write_text(json.dumps(config))
        if name != ".":
            with pytest.raises(CheckpointError, match="no such folder"):
                LayAlignForCausalLM.from_pretrained("out")
    if name == ".":
        return
    for ask in (load_llm, load_encoder, LayAlignForCausalLM.from_pretrained, lambda n: load_tokenizers(encoder=n)):
        with pytest.raises(CheckpointError, match="no such folder"):
            ask(name)
    with pytest.raises(CheckpointError, match="no such folder"):
        LayAlignForCausalLM.from_encoder_and_llm("models/encoder", name)
    assert asked == []


def test_a_name_of_an_old_checkpoint_may_be_one_of_the_hub(
    tree: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    path = tree / "out" / "config.json"
    model = named_model(("models/encoder", "models/llm"))
    model.save_pretrained("out")
    config = json.loads(path.read_text())
    for key in ("frozen_folders", "frozen_fingerprints"):
        del config[key]
    path.write_text(json.dumps({**config, "llm_name_or_path": "models/llm"}))
    again = LayAlignForCausalLM.from_pretrained("out")  # as it was typed, and where it was typed
    assert torch.equal(logits(again), logits(model)) and again.config.llm_name_or_path == str(tree / "models" / "llm")
    again.save_pretrained("second")
    assert json.loads((tree / "second" / "config.json").read_text())["llm_name_or_path"] == str(tree / "models" / "llm")
    assert asked == []
    path.write_text(json.dumps({**config, "llm_name_or_path": "someone/llm"}))
    named: list[str] = []
    monkeypatch.setattr(
        "layalign.modeling.encoders.load_llm", lambda name, **kwargs: named.append(name) or again.unload()
    )
    LayAlignForCausalLM.from_pretrained("out")
    assert named == ["someone/llm"]


def test_the_hub_is_asked_in_these_tests_where_a_name_may_be_its_own(asked: list[str]) -> None:
    from huggingface_hub import HfApi

    with pytest.raises(Exception, match="nobody is there"):
        HfApi().model_info("someone/llm", timeout=0.1)
    assert asked


@pytest.mark.slow
def test_a_hub_name_is_no_folder_that_happens_to_stand_there(
    tree: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    right = AutoModelForCausalLM.from_pretrained("models/llm")
    put_into_cache(right, "someone/llm", tmp_path / "cache", monkeypatch)
    model = named_model(("models/encoder", "someone/llm"))
    model.save_pretrained("out", changed_frozen="refuse")
    config = json.loads((tree / "out" / "config.json").read_text())
    assert config["llm_name_or_path"] == "someone/llm" and config["frozen_folders"] == {"encoder": "../models/encoder"}
    tiny_llm(num_key_value_heads=2, seed=5).save_pretrained("someone/llm")
    again = LayAlignForCausalLM.from_pretrained("out")
    assert torch.equal(logits(again), logits(model)) and again.config.llm_name_or_path == "someone/llm"
    again.save_pretrained("out", changed_frozen="refuse")
    assert json.loads((tree / "out" / "config.json").read_text())["llm_name_or_path"] == "someone/llm"
    assert asked == []
    with torch.no_grad():  # the cache is what the name gives
        again.llm.model.norm.weight.mul_(1.1)
    with pytest.raises(CheckpointError, match=r"the llm is not what its name someone/llm gives: model.norm.weight"):
        again.save_pretrained("out", changed_frozen="refuse")
    assert "it cannot be checked" not in caplog.text
    shutil.rmtree(tmp_path / "cache")
    again.save_pretrained("out")  # it cannot be checked: by name, and loading compares
    assert "the files of someone/llm are not on this machine" in caplog.text
    put_into_cache(right, "someone/llm", tmp_path / "cache", monkeypatch)
    with pytest.raises(CheckpointError, match=r"the llm \(someone/llm\) is not the one .* model.norm.weight"):
        LayAlignForCausalLM.from_pretrained("out")


def test_tokenizers_of_a_hub_name_are_those_of_the_hub(
    tree: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    encoder_tokenizer, llm_tokenizer = byte_tokenizer(add_eos=True), byte_tokenizer(add_eos=False)
    encoder_tokenizer.add_tokens("more")
    put_into_cache(AutoModelForCausalLM.from_pretrained("models/llm"), "someone/llm", tmp_path / "cache", monkeypatch)
    llm_tokenizer.save_pretrained(tmp_path / "cache" / "models--someone--llm" / "snapshots" / ("0" * 40))
    encoder_tokenizer.save_pretrained("models/encoder")
    model = named_model(("models/encoder", "someone/llm"))
    model.save_pretrained("out")
    (tree / "someone" / "llm").mkdir(parents=True)
    monkeypatch.chdir(tree)
    found = load_tokenizers("out", config=LayAlignForCausalLM.from_pretrained("out").config)
    assert [len(each) for each in found] == [len(encoder_tokenizer), len(llm_tokenizer)]


@pytest.mark.slow
def test_training_checkpoints_move_with_the_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = save_parts(tmp_path / "tree")
    monkeypatch.chdir(tmp_path / "tree")
    config = training_config(parts, Path("run"), encoder="encoder", llm="llm", max_steps=2, save_steps=1)
    train(config)
    (tmp_path / "tree").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "moved" / "run", tmp_path / "moved" / "run" / "checkpoint-1"):
        stored = json.loads((folder / "config.json").read_text())
        assert {part: len(entries) > 10 for part, entries in stored["frozen_fingerprints"].items()} == {
            "encoder": True, "llm": True,
        }  # fmt: skip
        model = LayAlignForCausalLM.from_pretrained(folder)
        assert model.config.llm_name_or_path == str(tmp_path / "moved" / "llm")
