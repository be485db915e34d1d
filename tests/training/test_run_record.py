"""A run goes on with what it began with: settings, examples, frozen parts and start, written into its checkpoints."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_training import TinyParts, save_parts, without_record
from tiny_training import training_config as make_config
from transformers import LlamaForCausalLM, TrainerCallback

from layalign import LayAlignForCausalLM
from layalign.cli import main
from layalign.training import TrainSummary, build_model, read_examples, train
from layalign.training.checkpoints import MANIFEST, publish
from layalign.training.config import ALLOWED_CHANGES, TrainConfig
from layalign.training.record import FILE, hash_of
from layalign.utils.errors import ArgumentError, CheckpointError

COMMON = {"max_steps": 3, "save_steps": 2, "save_total_limit": None}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyParts, Path]:
    """The parts, and a run of three steps with checkpoints at 2 and 3."""
    folder = tmp_path_factory.mktemp("made")
    parts = save_parts(folder)
    train(make_config(parts, folder / "run", **COMMON))
    return parts, folder / "run"


@pytest.fixture
def copied(made: tuple[TinyParts, Path], tmp_path: Path) -> tuple[TinyParts, Path]:
    """Both of one's own, in the same places to each other."""
    for name in ("encoder", "llm", "datas", "run"):
        shutil.copytree(made[1].parent / name, tmp_path / name)
    return TinyParts(*(str(tmp_path / name) for name in ("encoder", "llm", "datas"))), tmp_path / "run"


def go_on(parts: TinyParts, run: Path, **changes: Any) -> TrainSummary:
    return train(make_config(parts, run, **{**COMMON, "max_steps": 4, **changes}))


def refused(parts: TinyParts, run: Path, **changes: Any) -> str:
    """What the error says; nothing in the folder is touched."""
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    with pytest.raises(ArgumentError) as error:
        go_on(parts, run, **changes)
    assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == before
    return str(error.value)


def change_llm(parts: TinyParts) -> None:
    llm = LlamaForCausalLM.from_pretrained(parts.llm)
    with torch.no_grad():
        llm.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    llm.save_pretrained(parts.llm)


def change_llm_settings(parts: TinyParts) -> None:
    file = Path(parts.llm) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rms_norm_eps": 0.1}))


def change_encoder(parts: TinyParts) -> None:
    file = Path(parts.encoder) / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("layer.0.SelfAttention.q.weight") and "encoder" in name)
    save_file({**weights, name: -weights[name]}, file, metadata={"format": "pt"})


def change_data(parts: TinyParts) -> None:
    file = Path(parts.data) / "bilingual_pairs" / "en-de" / "train_100k.en"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:-1], "a new line"]) + "\n")


def change_tokenizer(parts: TinyParts) -> None:
    file = Path(parts.llm) / "tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(values))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (change_llm, "llm: the run in {run}/checkpoint-3 has another LLM than this one: model.layers.1.mlp.up_proj"),
        (change_llm_settings, "llm: the run in {run}/checkpoint-3 has another LLM than this one: configuration: rms_n"),
        (change_encoder, "encoder: the run in {run}/checkpoint-3 has another encoder than this one: "),
        (
            change_tokenizer,
            "tokenizers: the run in {run}/checkpoint-3 has other ones, with other vocabularies or",
        ),
    ],
)
def test_what_has_changed_under_the_same_path(
    copied: tuple[TinyParts, Path], change: Callable[[TinyParts], None], expected: str
) -> None:
    parts, run = copied
    change(parts)
    assert refused(parts, run).startswith(expected.format(run=run))


@pytest.mark.slow
@pytest.mark.parametrize("dev_size", [0, 8])
def test_data_that_has_changed_under_the_same_path(made: tuple[TinyParts, Path], tmp_path: Path, dev_size: int) -> None:
    parts, _ = made
    shutil.copytree(parts.data, tmp_path / "datas")
    own = TinyParts(parts.encoder, parts.llm, str(tmp_path / "datas"))
    run, changes = tmp_path / "run", {"dev_size": dev_size}
    train(make_config(own, run, **COMMON, **changes))
    shutil.move(tmp_path / "datas", tmp_path / "moved")
    moved = TinyParts(parts.encoder, parts.llm, str(tmp_path / "moved"))
    assert go_on(moved, run, **changes).resumed_from == str(run / "checkpoint-3")  # the same examples
    change_data(moved)
    text = refused(moved, run, max_steps=6, **changes)
    if dev_size:  # the line that changed is one of them
        assert text.startswith(
            f"dev: the run in {run}/checkpoint-4 has other dev examples, 8 of them, this one 8, of which"
        )
        assert "allow_changed" not in text
        return
    assert text.startswith(f"data: the run in {run}/checkpoint-4 has other train examples, 48 of them, this one 48")
    assert "; set allow_changed=data to resume anyway; set resume=false to start over" in text
    assert go_on(moved, run, max_steps=6, allow_changed=["data"], **changes).resumed_from == f"{run}/checkpoint-4"
    (note,) = json.loads((run / "checkpoint-6" / FILE).read_text())["changes"]
    assert note.startswith("data: has other train examples")


@pytest.mark.slow
def test_dev_examples_are_never_others(made: tuple[TinyParts, Path], tmp_path: Path) -> None:
    parts, _ = made
    config = make_config(parts, tmp_path, **COMMON)
    examples = read_examples(config)
    train(config, examples=examples[8:], dev_examples=examples[:8])
    with pytest.raises(
        ArgumentError, match="^dev: the run in .* has other dev examples, 8 of them, this one 8, of which"
    ):
        train(config, examples=examples[8:], dev_examples=examples[1:9])
    assert train(config, examples=list(examples)).resumed_from is not None  # the same, split off


def test_every_difference_is_named_at_once(copied: tuple[TinyParts, Path]) -> None:
    parts, run = copied
    change_llm(parts)
    text = refused(parts, run, learning_rate=1e-3, weight_decay=0.1, seed=1)
    keys = ["learning_rate", "weight_decay", "seed", "data", "dev", "llm"]
    positions = [text.index(f"{key}: ") for key in keys]
    assert positions == sorted(positions) and positions[0] == 0
    assert "allow_changed" not in text  # not all of it may be allowed
    text = refused(parts, run, learning_rate=1e-3, allow_changed=["learning_rate"])
    assert text.startswith("llm: ") and "learning_rate" not in text


@pytest.mark.slow
def test_other_settings_may_be_allowed_and_then_hold(copied: tuple[TinyParts, Path]) -> None:
    class Seen(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            (self.group,) = [group for group in optimizer.param_groups if group["params"]]
            self.values = {key: self.group[key] for key in ("lr", "initial_lr", "betas", "eps", "weight_decay")}

    parts, run = copied
    changes = {"learning_rate": 1e-3, "weight_decay": 0.1, "adam_beta1": 0.5, "adam_epsilon": 1e-5}
    text = refused(parts, run, lr_scheduler="constant", **changes)
    assert "allow_changed=learning_rate,lr_scheduler,weight_decay,adam_beta1,adam_epsilon to resume anyway" in text
    seen, allowed = Seen(), ["lr_scheduler", *changes]
    config = make_config(
        parts, run, **COMMON | {"max_steps": 4}, lr_scheduler="constant", **changes, allow_changed=allowed
    )
    assert train(config, callbacks=[seen]).resumed_from == str(run / "checkpoint-3")
    assert seen.values == {
        "lr": 1e-3, "initial_lr": 1e-3, "betas": (0.5, 0.999), "eps": 1e-5, "weight_decay": 0.1,
    }  # fmt: skip
    with pytest.raises(ArgumentError, match="^allow_changed: expected some of adam_beta1, .*, got 'llm'"):
        TrainConfig(allow_changed=["llm"])
    assert set(ALLOWED_CHANGES) <= {*TrainConfig().to_dict(), "tokenizers"}


def test_the_option_of_the_command(made: tuple[TinyParts, Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--config", str(made[1] / "train_config.yaml"), "--print-config"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--allow-changed", "learning_rate", "--allow-changed", "seed"])
    assert ended.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["allow_changed"] == ["learning_rate", "seed"]


@pytest.mark.slow
def test_a_checkpoint_carries_its_settings_along(copied: tuple[TinyParts, Path], tmp_path: Path) -> None:
    parts, run = copied
    alone = tmp_path / "elsewhere" / "checkpoint-3"
    shutil.copytree(run / "checkpoint-3", alone)
    assert "checkpoint-3 has 0.005, this one 0.001" in refused(
        parts, tmp_path / "new", resume=str(alone), learning_rate=1e-3
    )
    assert FILE in json.loads((alone / MANIFEST).read_text())["files"]
    assert go_on(parts, tmp_path / "new", resume=str(alone)).resumed_from == str(alone)
    # Going on from elsewhere into the folder of another run would overwrite that one's.
    changes = {"resume": str(alone), "learning_rate": 1e-3, "allow_changed": ["learning_rate"]}
    assert refused(parts, tmp_path / "new", **changes).startswith(f"learning_rate: the run in {tmp_path}/new has 0.005")


@pytest.mark.parametrize("content", [b"- 1\n", None], ids=str)
def test_the_settings_in_the_folder_are_not_what_decides(copied: tuple[TinyParts, Path], content: bytes | None) -> None:
    parts, run = copied
    file = run / "train_config.yaml"
    file.unlink() if content is None else file.write_bytes(content)
    assert refused(parts, run, learning_rate=1e-3).startswith("learning_rate: the run in")
    assert go_on(parts, run).resumed_from == str(run / "checkpoint-3")


@pytest.mark.slow
def test_old_runs_go_on_with_a_line_of_what_nobody_can_compare(
    copied: tuple[TinyParts, Path], caplog: pytest.LogCaptureFixture
) -> None:
    parts, run = copied
    without_record(run)
    file = run / "train_config.yaml"
    settings = file.read_bytes()
    assert refused(parts, run, learning_rate=1e-3).startswith("learning_rate: the run in")
    text = refused(parts, run)  # where the content is not known, the name counts
    assert text.startswith("data: the run in") and "init_checkpoint" not in text
    settings = yaml.safe_dump({**yaml.safe_load(settings), "data": parts.data}).encode()
    for content in (b"", b"7\n"):
        file.write_bytes(content)
        assert "expected the settings of the run, got" in refused(parts, run)
    file.write_bytes(settings)
    caplog.clear()
    assert go_on(parts, run).resumed_from == str(run / "checkpoint-3")
    assert "could not be compared with this run: the content of data, the weights that init" in caplog.text
    without_record(run)
    file.unlink()
    assert go_on(parts, run, max_steps=5, learning_rate=1e-3).resumed_from == str(run / "checkpoint-4")
    assert "could not be compared with this run: the settings, the content of data" in caplog.text
    without_record(run)
    change_llm(parts)  # its fingerprints are older than the record
    assert "; llm: it has another LLM than this one: " in refused(parts, run)


@pytest.mark.slow
def test_a_finished_model_without_checkpoints_is_not_overwritten(made: tuple[TinyParts, Path], tmp_path: Path) -> None:
    parts, _ = made
    run, changes = tmp_path / "run", {"max_steps": 2, "save_steps": 0}
    first = go_on(parts, run, **changes)
    text = refused(parts, run, **{**changes, "learning_rate": 1e-3, "allow_changed": ["learning_rate"]})
    assert text.startswith(f"learning_rate: the run in {run} has 0.005, this one 0.001; set resume=false to start over")
    weights = load_file(run / "model.safetensors")
    assert go_on(parts, run, **changes).loss_after == first.loss_after  # the same run, trained anew
    again = load_file(run / "model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())
    assert go_on(parts, run, **{**changes, "learning_rate": 1e-3, "resume": False}).steps == 2
    other = load_file(run / "model.safetensors")
    assert not all(torch.equal(other[name], weight) for name, weight in weights.items())
    for name in (FILE, "train_config.yaml"):
        (run / name).unlink()
    assert f"output_dir: {run} holds a model but no run.json or" in refused(parts, run, **changes)
    (run / FILE).write_text("[]")
    with pytest.raises(CheckpointError, match=r"run.json: expected what layalign writes there"):
        go_on(parts, run, **changes)


@pytest.mark.slow
def test_the_start_counts_by_its_content(made: tuple[TinyParts, Path], tmp_path: Path) -> None:
    parts, first = made
    task = {"stage": "task", "dev_size": 4, "learning_rate": 5e-3}
    shutil.copytree(first, tmp_path / "translation")
    go_on(parts, tmp_path / "task", init_checkpoint=str(tmp_path / "translation"), **task)
    shutil.move(tmp_path / "translation", tmp_path / "moved")
    changes = {"init_checkpoint": str(tmp_path / "moved"), "max_steps": 5, **task}
    assert go_on(parts, tmp_path / "task", **changes).resumed_from == str(tmp_path / "task" / "checkpoint-4")
    changes["max_steps"] = 6
    model = LayAlignForCausalLM.from_pretrained(tmp_path / "moved")
    with torch.no_grad():
        next(iter(model.mapping.parameters())).mul_(2)
    model.save_pretrained(tmp_path / "moved")
    text = refused(parts, tmp_path / "task", **changes)
    assert text.startswith("init_checkpoint: the run in ") and "has other trained weights from it, " in text
    assert "allow_changed=init_checkpoint to resume anyway" in text
    assert refused(parts, tmp_path / "task", **{**changes, "init_checkpoint": None}).startswith("init_checkpoint: ")
    go_on(parts, tmp_path / "task", allow_changed=["init_checkpoint"], **changes)


@pytest.mark.slow
def test_a_model_in_memory_is_compared_too(copied: tuple[TinyParts, Path]) -> None:
    parts, run = copied
    config = make_config(parts, run, **COMMON | {"max_steps": 4})
    model = build_model(config)
    with torch.no_grad():
        model.llm.lm_head.weight[3] += 1
    with pytest.raises(ArgumentError, match="^llm: the run in .* has another LLM than this one: lm_head.weight: other"):
        train(config, model=model)
    with pytest.raises(ArgumentError, match=r"^encoder_layers: the run in .* has \[0, 1, 2\], this one \[1, 0, 2\]"):
        train(config, model=build_model(make_config(parts, run, encoder_layers=[1, 0, 2])))
    assert train(config, model=build_model(config)).resumed_from == str(run / "checkpoint-3")


@pytest.mark.slow
def test_other_versions_and_processes_are_only_told(
    copied: tuple[TinyParts, Path], caplog: pytest.LogCaptureFixture
) -> None:
    parts, run = copied
    found = json.loads((run / "checkpoint-3" / FILE).read_text())
    found["versions"]["torch"], found["processes"]["world_size"] = "1.0", 4
    (run / "checkpoint-3" / FILE).write_text(json.dumps(found))
    (run / "checkpoint-3" / MANIFEST).unlink()
    publish((run / "checkpoint-3").rename(run / "old"), run / "checkpoint-3")
    with caplog.at_level(logging.INFO, "layalign"):
        assert go_on(parts, run).resumed_from == str(run / "checkpoint-3")
    assert f"torch '1.0' then, {torch.__version__} now" in caplog.text and "world_size 4 then, 1 now" in caplog.text


@pytest.mark.slow
def test_the_micro_batch_is_the_checkpoints(made: tuple[TinyParts, Path], tmp_path: Path) -> None:
    parts, run = made
    assert json.loads((run / "checkpoint-3" / FILE).read_text())["processes"] == {"world_size": 1, "micro_batch": 8}
    train(make_config(parts, tmp_path / "two", **COMMON, micro_batch_size=2))
    shutil.copytree(tmp_path / "two" / "checkpoint-3", tmp_path / "alone" / "checkpoint-3")
    values = {"resume": str(tmp_path / "alone" / "checkpoint-3"), "allow_changed": ["micro_batch_size"]}
    go_on(parts, tmp_path / "new", **values)
    assert json.loads((tmp_path / "new" / "training.json").read_text())["micro_batch"] == 2


def test_the_hash_is_of_what_is_learned(made: tuple[TinyParts, Path]) -> None:
    examples = read_examples(make_config(*made))
    whole = hash_of(examples)
    assert whole["examples"] == len(examples) == 48 and hash_of(iter(examples)) == whole
    assert hash_of(examples[::-1]) != whole != hash_of(examples[:-1])
    assert yaml.safe_load(json.dumps(whole)) == whole
