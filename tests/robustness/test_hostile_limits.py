"""Checkpoints that claim impossible sizes, or name code: told at once, before anything is built; no code is fetched."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import open_gates, tiny_encoder, tiny_llm
from tiny_training import byte_tokenizer
from transformers import AutoModelForCausalLM

from layalign import CheckpointError, LayAlignConfig, LayAlignForCausalLM
from layalign.modeling.checkpoint import read_weights
from layalign.modeling.tokenization import load_tokenizers
from layalign.utils import limits


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small`, with LoRA, beside the parts that it names; `whole` holds them."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_encoder().save_pretrained(folder / "encoder")
    tiny_llm().save_pretrained(folder / "llm")
    for part in ("encoder", "llm"):
        byte_tokenizer(add_eos=True).save_pretrained(folder / part)
    model = LayAlignForCausalLM.from_encoder_and_llm(str(folder / "encoder"), str(folder / "llm"))
    open_gates(model)
    model.save_pretrained(folder / "whole", save_frozen=True)
    model.add_lora({"r": 2, "target_modules": ["q_proj"]})
    model.save_pretrained(folder / "small")
    return folder


@pytest.fixture
def work(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    for kind in ("small", "whole"):
        path = tmp_path / kind / "config.json"
        path.write_text(path.read_text().replace(f"{saved}/", f"{tmp_path}/"))
    return tmp_path


def change(folder: Path, act: Callable[[dict[str, Any]], object], name: str = "config.json") -> None:
    content = json.loads((folder / name).read_text())
    act(content)
    (folder / name).write_text(json.dumps(content))


def refused(folder: Path) -> str:
    """The error's text, within ten seconds of work: what it is about takes minutes and all memory where it is begun."""
    begun = time.process_time()
    with pytest.raises(CheckpointError) as stopped:
        LayAlignForCausalLM.from_pretrained(folder)
    assert time.process_time() - begun < 10
    text = str(stopped.value)
    assert str(folder) in text and "\n" not in text and len(text) < 1000
    return text


MANY = 10**7


@pytest.mark.parametrize("kind", ["small", "whole"])
@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ("llm_config", "num_hidden_layers", MANY), ("encoder_config", "num_layers", MANY),
        ("encoder_config", "num_decoder_layers", MANY), ("llm_config", "num_labels", 10**8),
        ("llm_config", "num_attention_heads", MANY), ("llm_config", "max_position_embeddings", 10**12),
        ("llm_config", "num_local_experts", MANY), ("encoder_config", "relative_attention_num_buckets", MANY),
        (None, "language_layers", list(range(5000))), (None, "encoder_layers", [0] * 5000),
        (None, "num_labels", 10**8),
    ],
)  # fmt: skip
def test_numbers_that_nobody_can_build(kind: str, place: str | None, key: str, value: Any, work: Path) -> None:
    change(work / kind, lambda config: (config[place] if place else config).update({key: value}))
    many = len(value) if isinstance(value, list) else value
    assert f"{f'{place}.' if place else ''}{key}: expected at most" in (text := refused(work / kind))
    assert text.endswith(f", got {many}")


@pytest.mark.parametrize(("part", "key"), [("llm", "num_hidden_layers"), ("encoder", "num_layers")])
def test_numbers_of_a_part_that_is_named(part: str, key: str, work: Path) -> None:
    change(work / part, lambda config: config.update({key: MANY}))
    assert f"{key}: expected at most 4096, got {MANY}" in refused(work / "small")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"r": 10**9}, "r: expected at most 32768, got 1000000000"),
        ({"rank_pattern": {"q_proj": 10**9}}, "r: expected at most 32768"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is not supported"),
        ({"megatron_config": {}, "megatron_core": "antigravity"}, "megatron_config is not supported"),
        ({"megatron_core": "antigravity"}, "megatron_core is not supported"),
        ({"target_modules": "([a-z_.0-9]+)*!"}, "expected a pattern that ends in finite time"),
        ({"alpha_pattern": {"([a-z_.0-9]+)*!": 2}}, "expected a pattern that ends in finite time"),
    ],
)
def test_adapters_that_take_everything_or_import_something(settings: dict[str, Any], expected: str, work: Path) -> None:
    change(work / "small", lambda config: config["lora"].update(settings))
    assert expected in refused(work / "small")


def empty_tensors(path: Path, number: int) -> None:
    entries = ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(number))
    path.write_bytes(struct.pack("<Q", len(entries) + 2) + f"{{{entries}}}".encode())


@pytest.mark.slow
def test_a_million_empty_tensors(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by the length of their names; what is below that, by their number."""
    for folder in ("small", "llm"):
        kept = (work / folder / "model.safetensors").read_bytes()
        empty_tensors(work / folder / "model.safetensors", 10**6)
        assert "model.safetensors: expected at most 33554432 bytes of names" in refused(work / "small")
        (work / folder / "model.safetensors").write_bytes(kept)
    path = work / "small" / "model.safetensors"
    empty_tensors(path, 20_000)  # a mixture of experts
    assert len(read_weights(path)) == 20_000
    monkeypatch.setattr("layalign.modeling.checkpoint.MAX_TENSORS", 19_999)
    assert "model.safetensors: expected at most 19999 tensors, got 20000" in refused(work / "small")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_what_is_no_file_is_not_opened(name: str, work: Path) -> None:
    for make, expected in ((os.mkfifo, "expected a file, got a pipe"), (zero, "expected a file, got a device")):
        for folder in ("small", "llm"):
            kept = (work / folder / name).read_bytes()
            (work / folder / name).unlink()
            make(work / folder / name)
            assert expected in refused(work / "small")
            (work / folder / name).unlink()
            (work / folder / name).write_bytes(kept)


def zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def test_files_of_impossible_sizes(work: Path) -> None:
    """Sparse files: nothing is read of them."""
    for name, most in (("config.json", limits.MAX_JSON_BYTES), ("tokenizer.json", limits.MAX_TOKENIZER_BYTES)):
        with (work / "llm" / name).open("ab") as file:
            file.truncate(most + 1)
        with pytest.raises(CheckpointError, match=f"{name}: expected at most {most} bytes, got {most + 1}"):
            load_tokenizers(encoder=str(work / "encoder"), llm=str(work / "llm"))
        (work / "llm" / name).unlink()
    os.mkfifo(work / "encoder" / "special_tokens_map.json")
    with pytest.raises(CheckpointError, match="encoder tokenizer: .*special_tokens_map.json: expected a file, got a"):
        load_tokenizers(encoder=str(work / "encoder"), llm=str(work / "llm"))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """As where the package `kernels` is installed; what it is asked to fetch and run."""
    asked: list[Any] = []

    def get_kernel(*names: Any, **options: Any) -> Any:
        asked.append((names, options))
        raise RuntimeError(f"fetched {names}")

    module = types.ModuleType("kernels")
    module.__dict__.update(get_kernel=get_kernel, __getattr__=lambda name: get_kernel)
    monkeypatch.setitem(sys.modules, "kernels", module)
    import transformers.integrations.hub_kernels as hub

    for name, value in {"_kernels_available": True, "_kernels_enabled": True, "get_kernel": get_kernel}.items():
        monkeypatch.setattr(hub, name, value, raising=False)
    monkeypatch.setattr("transformers.modeling_utils.is_kernels_available", lambda *args, **kwargs: True, raising=False)
    monkeypatch.setattr(
        "transformers.modeling_utils.lazy_import_flash_attention",
        lambda name, *args, **options: get_kernel(name),
        raising=False,
    )
    return asked


KERNEL = "kernels-community/flash-attn2"


@pytest.mark.slow
@pytest.mark.parametrize("value", [KERNEL, f"{KERNEL}@main:forward", "flash_attention_2", {"": KERNEL}, ["a/b"]])
def test_a_checkpoint_names_no_kernel(
    value: Any, work: Path, kernels: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever the name stands; with the user's own word it counts."""
    for key in ("attn_implementation", "_attn_implementation"):
        for folder in ("encoder", "llm"):
            change(work / folder, lambda config, key=key: config.update({key: value}))
        for kind in ("small", "whole"):
            change(work / kind, lambda config, key=key: config.update({key: value}))
            for part in ("encoder_config", "llm_config"):
                change(work / kind, lambda config, key=key, part=part: config[part].update({key: value}))
    for kind in ("small", "whole"):
        caplog.clear()
        model = LayAlignForCausalLM.from_pretrained(work / kind)
        for config in (model.config, model.encoder.config, model.llm.config):
            assert config._attn_implementation in (None, "sdpa", "eager") or "layalign" in config._attn_implementation
        assert "config.json: attn_implementation: " in caplog.text
        assert "llm_config.attn_implementation: " in caplog.text and "a checkpoint brings no code" in caplog.text
    AutoModelForCausalLM.from_pretrained(work / "whole")
    assert kernels == []


def test_a_kernel_that_the_user_names_is_asked_for(work: Path, kernels: list[Any]) -> None:
    """So the test above can fail."""
    with pytest.raises(CheckpointError, match="fetched"):
        LayAlignForCausalLM.from_pretrained(work / "small", attn_implementation=KERNEL)
    assert kernels
    assert LayAlignConfig(attn_implementation="a/b")._attn_implementation == "a/b"
