"""save_pretrained / from_pretrained: trained weights alone or everything, dtypes, LoRA, damaged files."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import batch, logits, named_model, open_gates, tiny_folders, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from layalign import ArgumentError, CheckpointError, LayAlignConfig, LayAlignForCausalLM
from layalign.modeling.encoders import load_encoder


@pytest.fixture
def parts(tmp_path: Path) -> tuple[str, str]:
    """Frozen parts with names: folders on disk."""
    return tiny_folders(tmp_path)


@pytest.mark.parametrize("structure", ["Linear", "MLP"])
def test_only_trained_weights_are_written(parts, tmp_path: Path, structure: str) -> None:
    model = named_model(parts, structure=structure, encoder_layers=[1, 3], language_layers=[2, 0])
    model.save_pretrained(tmp_path / "out")
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert names == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(name.split(".")[0] in ("mapping", "encoder_aligner", "cross_attention") for name in names)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["encoder_name_or_path"], config["llm_name_or_path"]) == parts
    assert config["encoder_layers"] == [1, 3] and config["language_layers"] == [2, 0]
    for load in (LayAlignForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        again = load(tmp_path / "out")
        assert isinstance(again, LayAlignForCausalLM) and not again.training
        assert torch.equal(logits(again), logits(model))
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "out"), LayAlignConfig)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["mt5", "m2m_100", "xlm-roberta", "qwen2"])
def test_everything_on_request(tmp_path: Path, encoder: str) -> None:
    model = tiny_model(encoder=encoder)
    model.save_pretrained(tmp_path / "out", save_frozen=True)
    again = LayAlignForCausalLM.from_pretrained(tmp_path / "out")
    assert set(again.state_dict()) == set(model.state_dict())
    assert torch.equal(logits(again), logits(model))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_everything_keeps_each_parts_dtype(tmp_path: Path) -> None:
    model = tiny_model()
    model.llm.to(torch.bfloat16)
    model.encoder.to(torch.float16)
    before = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "out", save_frozen=True)
    again = LayAlignForCausalLM.from_pretrained(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in again.state_dict().items()} == before


def test_unnamed_frozen_parts_are_saved_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    with caplog.at_level(logging.WARNING, logger="layalign"):
        model.save_pretrained(tmp_path / "out")
    assert "saving the encoder and llm too: there is no name" in caplog.text
    assert torch.equal(logits(LayAlignForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_saved_dtype_comes_back(parts, tmp_path: Path, dtype: torch.dtype) -> None:
    model = named_model(parts)
    model.mapping.to(dtype)
    model.encoder_aligner.to(dtype)
    model.cross_attention.to(dtype)
    model.save_pretrained(tmp_path / "out")
    again = LayAlignForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in again.parameters() if p.requires_grad} == {dtype}
    assert {p.dtype for p in again.llm.parameters()} == {torch.float32}
    cast = LayAlignForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert {p.dtype for p in cast.parameters()} == {torch.float32}
    whole = LayAlignForCausalLM.from_pretrained(tmp_path / "out", dtype="bfloat16")
    encoder = load_encoder(parts[0], dtype=torch.bfloat16)  # older transformers keep some of T5's weights in float32
    assert [p.dtype for p in whole.encoder.parameters()] == [p.dtype for p in encoder.parameters()]
    assert {p.dtype for n, p in whole.named_parameters() if not n.startswith("encoder.")} == {torch.bfloat16}
    assert logits(whole).dtype == torch.bfloat16


def test_half_precision_llm_with_float32_aligner(parts) -> None:
    model = LayAlignForCausalLM.from_encoder_and_llm(
        *parts, llm_kwargs={"dtype": torch.bfloat16}, encoder_kwargs={"dtype": torch.bfloat16}
    )
    open_gates(model)
    assert model.mapping.end_boundary.dtype == torch.float32
    loss = model(**batch(model=model)).loss
    loss.backward()
    assert torch.isfinite(loss) and model.encoder_aligner.projector.fc2.weight.grad.dtype == torch.float32
    assert model.generate(**batch(model=model, targets=None), max_new_tokens=3).shape[1] > 3


@pytest.mark.slow
def test_attention_implementation_is_passed_on(parts, tmp_path: Path) -> None:
    named_model(parts).save_pretrained(tmp_path / "out")
    again = LayAlignForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert again.llm.config._attn_implementation == "layalign_eager"
    tiny_model().save_pretrained(tmp_path / "all", save_frozen=True)
    again = LayAlignForCausalLM.from_pretrained(tmp_path / "all", attn_implementation="eager")
    assert again.llm.config._attn_implementation == "layalign_eager"


@pytest.mark.slow
def test_lora_trains_saves_and_loads(parts, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig

    model = named_model(parts)
    model.add_lora(LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj"]))
    before = logits(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch(model=model)).loss.backward()
        optimizer.step()
    assert (logits(model) - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "out")
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert any("lora_A" in name for name in names) and not any("base_layer" in name for name in names)
    again = LayAlignForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == names
    model.save_pretrained(tmp_path / "all", save_frozen=True)
    assert torch.equal(logits(LayAlignForCausalLM.from_pretrained(tmp_path / "all")), logits(model))


def test_saving_over_the_folder_it_came_from(parts, tmp_path: Path) -> None:
    named_model(parts).save_pretrained(tmp_path / "out")
    model = LayAlignForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        model.mapping.end_boundary.add_(1.0)
    expected = logits(model)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(LayAlignForCausalLM.from_pretrained(tmp_path / "out")), expected)
    assert not list((tmp_path / "out").glob("*.unfinished"))


def test_damaged_and_foreign_checkpoints(parts, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="no readable LayAlign checkpoint"):
        LayAlignForCausalLM.from_pretrained(out)
    with pytest.raises(CheckpointError, match="expected a layalign checkpoint, got 'llama'"):
        LayAlignForCausalLM.from_pretrained(parts[1])
    named_model(parts).save_pretrained(out)
    weights = {name: tensor.clone() for name, tensor in load_file(out / "model.safetensors").items()}
    whole = (out / "model.safetensors").read_bytes()

    (out / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read"):
        LayAlignForCausalLM.from_pretrained(out)
    save_file({k: v for k, v in weights.items() if "fc1.bias" not in k}, out / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"encoder_aligner.projector.fc1.bias is missing"):
        LayAlignForCausalLM.from_pretrained(out)
    save_file({**weights, "surprise": torch.zeros(1)}, out / "model.safetensors")
    with pytest.raises(CheckpointError, match="the model has no 'surprise'"):
        LayAlignForCausalLM.from_pretrained(out)
    save_file({**weights, "mapping.end_boundary": torch.zeros(1, 1, 3)}, out / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"mapping.end_boundary: expected \(1, 1, 32\), got \(1, 1, 3\)"):
        LayAlignForCausalLM.from_pretrained(out)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"structure": "Deep"}, "structure: expected one of"),
        ({"encoder_layers": [0, 5]}, r"encoder_layers: expected indices in 0..4, got \[5\]"),
        ({"encoder_layers": []}, "encoder_layers: expected at least one layer"),
        ({"language_layers": [3]}, r"language_layers: expected indices in 0..2, got \[3\]"),
        ({"language_layers": [1, 1]}, "language_layers: expected each layer once"),
        ({"source_token_id": 64}, "source_token_id: expected 0..63, got 64"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        tiny_model(**settings)
