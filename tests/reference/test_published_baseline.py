"""The benchmarks' baseline against this library's compatibility classes: the same numbers and the same names."""

from __future__ import annotations

import pytest
import torch
from published_tiny import ENCODER_LAYERS, assert_same, data, loss_and_gradients, published_model, settings
from tiny import tiny_encoder, tiny_llm

from layalign.published.classes import LayAlign, LayAlignConfig

CASES = [("llama", "Linear", (0, 1, 2)), ("mistral", "MLP", (0, 2)), ("qwen2", "Linear", (2,))]


def compat_model(llm: str, structure: str, layers: tuple[int, ...], tmp_path) -> LayAlign:
    tiny_encoder().save_pretrained(tmp_path / "encoder")
    part = tiny_llm(llm, eos_token_id=None)
    part.generation_config.eos_token_id = None
    part.save_pretrained(tmp_path / "llm")
    config = LayAlignConfig(
        mt_path=str(tmp_path / "encoder"), llm_path=str(tmp_path / "llm"), **vars(settings(structure, layers))
    )
    return LayAlign(config).eval()


@pytest.mark.parametrize(("llm", "structure", "layers"), CASES)
def test_loss_gradients_generation_and_names(llm: str, structure: str, layers: tuple[int, ...], tmp_path) -> None:
    baseline, ours = published_model(llm, structure, layers), compat_model(llm, structure, layers, tmp_path)
    assert baseline.config.encoder_aligner_config.encoder_layers == ENCODER_LAYERS
    assert str(ours.load_state_dict(baseline.state_dict(), strict=True)) == "<All keys matched successfully>"
    expected = loss_and_gradients(baseline, data())
    loss = ours(**data())
    loss.backward()
    found = {name: parameter.grad for name, parameter in ours.published_parameters()}
    assert_same(expected, {"loss": loss.detach(), **found})
    new = baseline(**data(labels=False)), ours(**data(labels=False))
    assert new[0].shape == (3, 6) and torch.equal(*new)


def test_only_the_published_parts_train() -> None:
    trains = {name for name, parameter in published_model().named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in trains} == {"mapping", "encoder_aligner", "model_llm"}
    assert sum(name.startswith("model_llm") for name in trains) == 3
