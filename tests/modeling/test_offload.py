"""Weights that accelerate keeps in another place between calls: the numbers are those of a model that is all there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from tiny import batch, open_gates, tiny_encoder, tiny_llm, tiny_model
from transformers import AutoModelForCausalLM

from layalign import LayAlignForCausalLM
from layalign.nn.inspection import device_of

CPU = torch.device("cpu")


def _found(model: LayAlignForCausalLM) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, the loss, and what is generated."""
    inputs = batch(model=model)
    source = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    with torch.no_grad():
        logits = model(**source).logits[inputs["attention_mask"].bool()]
        return logits, model(**inputs).loss, model.generate(**source, max_new_tokens=3, do_sample=False)


def _assert_alike(model: LayAlignForCausalLM, expected: tuple[torch.Tensor, ...], atol: float = 1e-5) -> None:
    for _ in range(2):
        for found, wanted in zip(_found(model), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=atol, rtol=1e-5)
    assert device_of(model.get_input_embeddings()) == CPU


@pytest.mark.slow
@pytest.mark.parametrize("part", ["llm", "encoder", "whole"])
@pytest.mark.parametrize(
    "settings",
    [
        {"fold_projections": "always"},
        {"llm": "gpt2", "encoder": "bert", "structure": "MLP"},
        {"llm": "phi3", "mix": "shared"},
    ],
    ids=["folded before", "other maps", "shared mix"],
)
def test_a_part_on_the_cpu_or_the_disk(part: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(**settings)
    expected = _found(model)
    offloaded = model if part == "whole" else getattr(model, part)
    if settings.get("fold_projections"):
        cpu_offload(offloaded, execution_device=CPU)
    else:
        disk_offload(offloaded, tmp_path, execution_device=CPU)
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    _assert_alike(model, expected)


def _names(model: LayAlignForCausalLM) -> list[tuple[str, torch.dtype, bool]]:
    return [(name, parameter.dtype, parameter.requires_grad) for name, parameter in model.named_parameters()]


@pytest.mark.slow
def test_a_whole_checkpoint_in_little_memory(tmp_path: Path) -> None:
    load = AutoModelForCausalLM.from_pretrained
    model = tiny_model()
    model.llm.to(torch.bfloat16)  # each part comes back in its own dtype
    model.save_pretrained(tmp_path / "model", save_frozen=True)
    places = {"device_map": "auto", "max_memory": {"cpu": "20KB"}, "offload_folder": str(tmp_path / "offloaded")}
    loaded = load(tmp_path / "model", **places)
    assert sum(parameter.is_meta for parameter in loaded.parameters()) > 60
    assert _names(loaded) == _names(model)
    _assert_alike(loaded, _found(model), atol=0.05)  # bfloat16: folded in one rounding, called in two
    wide = load(tmp_path / "model", dtype=torch.float32, **places)
    assert {dtype for _, dtype, _ in _names(wide)} == {torch.float32}
    _assert_alike(wide, _found(load(tmp_path / "model", dtype=torch.float32)))


def test_the_memory_is_for_both_parts_together(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "model", save_frozen=True)
    sizes = [sum(p.numel() * p.element_size() for p in part.parameters()) for part in (model.encoder, model.llm)]
    places = {"device_map": "auto", "offload_folder": str(tmp_path / "offloaded")}
    loaded = LayAlignForCausalLM.from_pretrained(
        tmp_path / "model", max_memory={"cpu": sizes[0] + sizes[1] // 2}, **places
    )
    assert not any(parameter.is_meta for parameter in loaded.encoder.parameters())
    assert any(parameter.is_meta for parameter in loaded.llm.parameters())


@pytest.mark.slow
def test_frozen_parts_larger_than_the_memory(tmp_path: Path) -> None:
    tiny_encoder().save_pretrained(tmp_path / "encoder")
    tiny_llm().save_pretrained(tmp_path / "llm")
    names = str(tmp_path / "encoder"), str(tmp_path / "llm")
    places = {"device_map": "auto", "max_memory": {"cpu": "20KB"}, "offload_folder": str(tmp_path / "offloaded")}
    model = LayAlignForCausalLM.from_encoder_and_llm(*names, llm_kwargs=places).eval()
    assert model.get_input_embeddings().weight.is_meta and not any(p.is_meta for p in model.mapping.parameters())
    open_gates(model)
    expected = _found(model)
    model.save_pretrained(tmp_path / "model")
    loaded = LayAlignForCausalLM.from_pretrained(tmp_path / "model", **places)
    assert not any(parameter.is_meta for name, parameter in loaded.named_parameters() if parameter.requires_grad)
    assert loaded.get_input_embeddings().weight.is_meta
    _assert_alike(loaded, expected)
    _assert_alike(LayAlignForCausalLM.from_pretrained(tmp_path / "model"), expected)
