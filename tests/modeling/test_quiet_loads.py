"""Loading a part says nothing where all is well, and everything where it is not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import ENCODERS, logits, open_gates, tiny_encoder, tiny_llm
from transformers import AutoConfig

from layalign import CheckpointError, LayAlignForCausalLM
from layalign.modeling.encoders import load_encoder, load_llm


@pytest.fixture(autouse=True)
def loud(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' lines are as for a user who has set nothing, and seen here."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    yield
    transformers.logging.set_verbosity(before)


def whole_model(name: str, class_name: str, **changes: Any) -> Any:
    """A model as it is published: with a head, or with a decoder."""
    torch.manual_seed(0)
    return getattr(transformers, class_name)(AutoConfig.for_model(name, **{**ENCODERS[name], **changes}))


PUBLISHED = [
    ("bert", "BertModel"), ("bert", "BertForMaskedLM"), ("bert", "BertForSequenceClassification"),
    ("xlm-roberta", "XLMRobertaForMaskedLM"), ("xlm-roberta", "XLMRobertaModel"),
    ("mt5", "MT5ForConditionalGeneration"), ("t5", "T5EncoderModel"), ("umt5", "UMT5ForConditionalGeneration"),
    ("m2m_100", "M2M100ForConditionalGeneration"),
    ("modernbert", "ModernBertForMaskedLM"), ("qwen2", "Qwen2ForCausalLM"),
]  # fmt: skip


@pytest.mark.parametrize("name, class_name", PUBLISHED)
def test_a_published_encoder_loads_without_a_word(
    name: str, class_name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = whole_model(name, class_name)
    whole.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    assert caplog.text == ""
    ids = torch.randint(4, 60, (1, 7))
    own = whole.get_encoder() if name in ("mt5", "t5", "umt5", "m2m_100") else whole.base_model
    wanted = own.eval()(input_ids=ids).last_hidden_state
    assert torch.equal(encoder(input_ids=ids).last_hidden_state, wanted)


@pytest.mark.parametrize("saved_as", ["without", "with"])
def test_a_bert_encoder_without_a_pooler_saves_and_loads_without_a_word(
    saved_as: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bert = transformers.BertModel(AutoConfig.for_model("bert", **ENCODERS["bert"]), add_pooling_layer=False)
    bert.save_pretrained(tmp_path / "encoder")
    tiny_llm().save_pretrained(tmp_path / "llm")
    model = LayAlignForCausalLM.from_encoder_and_llm(str(tmp_path / "encoder"), str(tmp_path / "llm")).eval()
    open_gates(model)
    model.save_pretrained(tmp_path / "out", save_frozen=saved_as == "with")
    again = LayAlignForCausalLM.from_pretrained(tmp_path / "out")
    assert caplog.text == ""
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("tied", [True, False])
def test_an_llm_loads_without_a_word(tied: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_llm(tie_word_embeddings=tied).save_pretrained(tmp_path)
    load_llm(str(tmp_path))
    assert caplog.text == ""


def change_weights(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


LACKING = [
    ("bert", "BertModel", "encoder.layer.2.output.dense.weight"),
    ("xlm-roberta", "XLMRobertaForMaskedLM", "roberta.embeddings.word_embeddings.weight"),
    ("mt5", "MT5ForConditionalGeneration", "encoder.block.1.layer.0.SelfAttention.q.weight"),
    ("m2m_100", "M2M100ForConditionalGeneration", "model.encoder.layers.1.fc1.weight"),
]


@pytest.mark.parametrize("name, class_name, weight", LACKING)
def test_an_encoder_that_lacks_weights_is_refused(name: str, class_name: str, weight: str, tmp_path: Path) -> None:
    whole_model(name, class_name).save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: weights.pop(weight))
    missing = weight.removeprefix("roberta.").removeprefix("model.")
    with pytest.raises(CheckpointError, match=rf"encoder: {tmp_path} lacks weights of its \w+: {missing}"):
        load_encoder(str(tmp_path))


def test_weights_that_nothing_reads_may_be_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The decoder of an encoder-decoder: only its encoder is taken."""
    whole_model("m2m_100", "M2M100ForConditionalGeneration").save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: weights.pop("model.decoder.layers.0.fc1.weight"))
    load_encoder(str(tmp_path))
    assert caplog.text == ""


def test_an_llm_that_lacks_its_head_or_a_layer_is_refused(tmp_path: Path) -> None:
    tiny_llm().save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match="lacks weights of its LlamaForCausalLM: lm_head.weight"):
        load_llm(str(tmp_path))
    change_weights(tmp_path, lambda weights: [weights.pop(n) for n in list(weights) if ".layers.2." in n])
    with pytest.raises(CheckpointError, match=r"lm_head.weight and \d+ more"):
        load_llm(str(tmp_path))


@pytest.mark.parametrize("part", ["encoder", "llm"])
def test_layers_that_the_configuration_does_not_have_are_told_in_a_line(
    part: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_encoder("bert") if part == "encoder" else tiny_llm()
    model.save_pretrained(tmp_path)
    config = model.config
    config.num_hidden_layers = 2
    config.save_pretrained(tmp_path)
    (load_encoder if part == "encoder" else load_llm)(str(tmp_path))
    assert len(caplog.records) == 1
    assert f"{part}: {tmp_path} has weights that its" in caplog.text and "is its configuration that of" in caplog.text


def test_weights_of_other_shapes_are_an_error_with_the_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_encoder("bert").save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: weights.update({"embeddings.LayerNorm.weight": torch.ones(5)}))
    with pytest.raises(RuntimeError):
        load_encoder(str(tmp_path))
    assert "embeddings.LayerNorm.weight" in caplog.text and "MISMATCH" in caplog.text
