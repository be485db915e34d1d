"""bf16 where the processor has it, and the frozen parts' dtype with it; a run keeps what it began with."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import TinyParts, save_parts
from tiny_training import training_config as make_config
from transformers import TrainerCallback

from layalign.training import build_model, precision, train, training_arguments
from layalign.training.config import TrainConfig
from layalign.training.precision import frozen_dtype, native_bf16, uses_bf16
from layalign.training.record import FILE
from layalign.utils.errors import ArgumentError


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    return save_parts(tmp_path_factory.mktemp("parts"))


def give(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(precision, "native_bf16", lambda use_cpu=False: (native, "a processor of the tests"))


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / FILE).read_text())["settings"]


class Seen(TrainerCallback):
    """Keeps what the Trainer was given."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.found = found

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found["bf16"] = args.bf16


# What the processor has


@pytest.mark.parametrize(
    ("capabilities", "native"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_f": True, "avx512_vnni": True}, False),  # oneDNN takes bf16 there, and is slow
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True, "avx512_bf16": False}, True),
    ],
)
def test_cpus(monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], native: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert native_bf16(use_cpu=True)[0] == native
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    for name, key in (("_is_avx512_bf16_supported", "avx512_bf16"), ("_is_amx_tile_supported", "amx_bf16")):
        monkeypatch.setattr(torch.cpu, name, lambda key=key: capabilities.get(key, False), raising=False)
    assert native_bf16(use_cpu=True)[0] == native


@pytest.mark.parametrize("native", [True, False])
def test_gpus(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    # Older GPUs emulate it.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert native_bf16() == (native, "a GPU")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert not native_bf16(use_cpu=True)[0]


def test_this_cpu_is_judged_by_its_instructions() -> None:
    file = Path("/proc/cpuinfo")
    if not file.exists() or "flags" not in file.read_text():
        pytest.skip("not an x86 machine with Linux")
    flags = set(next(line for line in file.read_text().splitlines() if line.startswith("flags")).split())
    assert native_bf16(use_cpu=True)[0] == bool(flags & {"avx512_bf16", "amx_bf16"})


# What follows from it


@pytest.mark.parametrize(
    ("bf16", "asked", "native", "in_bf16", "frozen"),
    [
        ("auto", "auto", True, True, "bfloat16"),
        ("auto", "auto", False, False, "stored"),
        (True, "auto", False, True, "bfloat16"),
        (False, "auto", True, False, "stored"),
        ("auto", "stored", True, True, "stored"),
        ("auto", "float32", True, True, "float32"),
        (False, "bfloat16", False, False, "bfloat16"),
    ],
)
def test_auto(
    monkeypatch: pytest.MonkeyPatch, bf16: bool | str, asked: str, native: bool, in_bf16: bool, frozen: str
) -> None:
    give(monkeypatch, native)
    config = TrainConfig(bf16=bf16, frozen_dtype=asked, use_cpu=True)
    assert (uses_bf16(config), frozen_dtype(config)) == (in_bf16, frozen)
    assert training_arguments(config).bf16 == in_bf16


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a machine without a GPU")
def test_a_cpu_that_nobody_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, True)
    arguments = training_arguments(TrainConfig())
    assert arguments.bf16 and arguments.device.type == "cpu"


def test_it_is_the_default() -> None:
    assert (TrainConfig().bf16, TrainConfig().frozen_dtype) == ("auto", "auto")


@pytest.mark.parametrize("native", [True, False])
def test_what_was_chosen_is_used_told_and_recorded(
    parts: TinyParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, native: bool
) -> None:
    give(monkeypatch, native)
    config = make_config(parts, tmp_path, bf16="auto", max_steps=1, save_steps=1)
    assert build_model(config).llm.dtype == build_model(config).encoder.dtype == (
        torch.bfloat16 if native else torch.float32
    )  # fmt: skip
    seen = {}
    with caplog.at_level(logging.INFO, "layalign"):
        train(config, callbacks=[Seen(seen)])
    assert seen["bf16"] == native
    frozen = ("bfloat16", "in bfloat16") if native else ("stored", "as stored")
    (line,) = [record.message for record in caplog.records if record.message.startswith("bf16: ")]
    assert line == f"bf16: {str(native).lower()} (a processor of the tests); frozen parts {frozen[1]}"
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        assert (settings(folder)["bf16"], settings(folder)["frozen_dtype"]) == (native, frozen[0])


@pytest.mark.slow
@pytest.mark.parametrize("began", [True, False])
def test_a_run_goes_on_with_the_precision_that_it_began_with(
    parts: TinyParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, began: bool
) -> None:
    config = make_config(parts, tmp_path, bf16="auto", max_steps=2, save_steps=1)
    give(monkeypatch, began)
    train(replace(config, max_steps=1))
    give(monkeypatch, not began)
    seen: dict[str, Any] = {}
    caplog.clear()
    with caplog.at_level(logging.INFO, "layalign"):
        assert train(config, callbacks=[Seen(seen)]).resumed_from == str(tmp_path / "checkpoint-1")
    assert seen["bf16"] == began == settings(tmp_path)["bf16"]
    slow = "bf16: the run began with it and keeps it; this is a processor of the tests, where it may be slower"
    assert (slow in caplog.text) == began
    assert ("bf16: false (as the run began); frozen parts as stored" in caplog.text) == (not began)
    with pytest.raises(ArgumentError, match="^bf16: the run in .* allow_changed=bf16 to resume anyway"):
        train(replace(config, bf16=not began, max_steps=3))
    changed = train(replace(config, bf16=not began, max_steps=3, allow_changed=["bf16"]), callbacks=[Seen(seen)])
    assert changed.resumed_from == str(tmp_path / "checkpoint-2") and seen["bf16"] is not began
    assert settings(tmp_path)["frozen_dtype"] == ("bfloat16" if began else "stored")  # it stays


@pytest.mark.slow
def test_a_run_from_before_the_key_was_in_float32(
    parts: TinyParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(parts, tmp_path, max_steps=2, save_steps=0)
    train(config)
    record = json.loads((tmp_path / FILE).read_text())
    record["settings"]["frozen_dtype"] = "auto"  # as earlier releases wrote it, and meant: as stored
    (tmp_path / FILE).write_text(json.dumps(record))
    give(monkeypatch, True)
    seen: dict[str, Any] = {}
    train(replace(config, bf16="auto"), callbacks=[Seen(seen)])  # trained again, from the beginning
    assert not seen["bf16"] and settings(tmp_path)["frozen_dtype"] == "stored"


def test_a_model_in_memory_keeps_its_dtype(parts: TinyParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, True)
    config = make_config(parts, tmp_path, bf16="auto", max_steps=1)
    model = build_model(replace(config, frozen_dtype="float32"))
    train(config, model=model)
    assert model.llm.dtype == torch.float32 and settings(tmp_path)["frozen_dtype"] == "stored"
