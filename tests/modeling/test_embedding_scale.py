"""LLMs that scale their embeddings or logits: what soft tokens and text are in the first layer, logits and loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scaling_llms import LLMS, scaling_llm, scaling_model
from tiny import batch
from torch import nn

from layalign import ArgumentError, LayAlignConfig, LayAlignForCausalLM
from layalign.modeling import embedding_scale, liger
from layalign.modeling.decoders import SCALED_IN_DECODER


class Stop(Exception):
    """The first layer has been reached."""


def in_first_layer(llm: nn.Module, call) -> torch.Tensor:
    """What ``call`` gives the first layer of ``llm``, (B, T, D_l)."""
    found: list[torch.Tensor] = []

    def hook(module, args, kwargs):
        found.append(args[0] if args else kwargs["hidden_states"])
        raise Stop

    layers = next(module for module in llm.modules() if isinstance(module, nn.ModuleList))
    handle = layers[0].register_forward_pre_hook(hook, with_kwargs=True)
    with pytest.raises(Stop), torch.no_grad():
        call()
    handle.remove()
    return found[0]


def in_slots(model: LayAlignForCausalLM) -> tuple[torch.Tensor, torch.Tensor]:
    """The first sample's soft tokens and boundary as the adapter makes them, and as the first layer gets them."""
    inputs = batch(model=model, targets=None)
    length = int(inputs["encoder_attention_mask"][0].sum())
    begin = int(inputs["attention_mask"][0].argmax()) + 1  # behind the bos token
    states = in_first_layer(model.llm, lambda: model(**inputs))
    with torch.no_grad():
        soft, _ = model.encode_source(inputs["encoder_input_ids"], inputs["encoder_attention_mask"])
        made = torch.cat([soft[0, :length], model.mapping.get_embed()[0]])
    return made, states[0, begin : begin + length + 1]


@pytest.mark.parametrize("name", LLMS)
def test_soft_tokens_and_text_enter_the_first_layer_the_same_way_in_every_version(name: str) -> None:
    model = scaling_model(name)
    made, entered = in_slots(model)
    torch.testing.assert_close(entered, made * LLMS[name][1], rtol=2e-6, atol=1e-6)
    inputs = batch(model=model, targets=None)
    both = in_first_layer(model.llm, lambda: model(**inputs))
    ids = inputs["input_ids"]
    llm = scaling_llm(name)
    alone = in_first_layer(llm, lambda: llm(input_ids=ids))
    text = inputs["attention_mask"].bool() & (ids != model.config.source_token_id)
    assert text.any() and torch.equal(both[text], alone[text])


@pytest.mark.parametrize("name", LLMS)
def test_logits_and_loss_are_those_of_the_whole_llm(name: str) -> None:
    model = scaling_model(name)
    inputs = batch(model=model)
    labels = inputs["labels"]
    with torch.no_grad():
        found = model(**inputs).loss
        some = model(**{**inputs, "labels": None}, logits_to_keep=2).logits
        for module in model.cross_attention:
            nn.init.zeros_(module.adaption_gate)
        bare = model(**inputs).loss
        _, mask, embeds, _ = model._begin(*(inputs[key] for key in ORDER))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        whole = scaling_llm(name)(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits
        expected = F.cross_entropy(whole[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        torch.testing.assert_close(bare, expected)
        kept = model(**{**inputs, "labels": None}, logits_to_keep=2).logits
        torch.testing.assert_close(kept, whole[:, -2:], rtol=1e-4, atol=1e-5)
    open_before = (found - bare).abs() > 1e-5 and not torch.equal(kept, some)
    assert open_before or not model.cross_attention


ORDER = ("input_ids", "attention_mask", "encoder_input_ids", "encoder_attention_mask")


@pytest.mark.parametrize("name", LLMS)
def test_what_an_llm_does_to_its_logits_keeps_liger_away(name: str) -> None:
    llm, heads = scaling_llm(name), []
    handle = llm.get_output_embeddings().register_forward_hook(lambda module, args, output: heads.append(output))
    with torch.no_grad():
        logits = llm(input_ids=torch.tensor([[3, 4, 5]])).logits
    handle.remove()
    changed = not torch.equal(logits, heads[0])
    assert changed == (name in ("gemma2", "vaultgemma", "cohere", "cohere2") or name.startswith("granite"))
    assert not changed or "after the head" in (liger.reason_against(llm, device="cuda") or "")


@pytest.mark.parametrize("name", SCALED_IN_DECODER)
def test_a_checkpoint_of_before_keeps_its_scaled_soft_tokens(name: str, tmp_path: Path) -> None:
    model = scaling_model(name)
    model.save_pretrained(tmp_path, save_frozen=True)
    assert LayAlignConfig.from_pretrained(tmp_path).scaled_soft_tokens is False
    text = (tmp_path / "config.json").read_text()
    new = text.replace('  "scaled_soft_tokens": false,\n', "")
    assert new != text
    version = model.config.to_dict()["transformers_version"]
    for written_by, factor in (("5.3.0", 32**0.5), ("4.57.1", 32**0.5), ("5.4.0", 1.0)):
        changed = new.replace(f'"transformers_version": "{version}"', f'"transformers_version": "{written_by}"')
        (tmp_path / "config.json").write_text(changed)
        loaded = LayAlignForCausalLM.from_pretrained(tmp_path)
        made, entered = in_slots(loaded)
        torch.testing.assert_close(entered, made * factor)
        assert loaded.config.scaled_soft_tokens is (factor != 1)  # and saved so


@pytest.mark.parametrize("name", ["gemma2", "vaultgemma"])
def test_softcapping_of_the_scores_is_kept_where_transformers_takes_sdpa(name: str) -> None:
    expected = scaling_model(name)
    llm = scaling_llm(name)
    llm.config._attn_implementation_internal = "sdpa"  # what from_pretrained chose before transformers refused it
    model = LayAlignForCausalLM.from_encoder_and_llm(expected.encoder, llm)
    assert model.attach_report.implementation == "layalign_eager"
    model.load_state_dict(expected.state_dict())
    inputs = batch(model=expected, targets=None)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**inputs).logits, expected(**inputs).logits)


def test_scaled_soft_tokens_are_for_llms_whose_factor_moved() -> None:
    with pytest.raises(ArgumentError, match="scaled_soft_tokens: expected false for an LLM that is none of gemma"):
        scaling_model("llama", scaled_soft_tokens=True)
    with pytest.raises(ArgumentError, match="scaled_soft_tokens: expected true, false or None, got 1"):
        LayAlignConfig(scaled_soft_tokens=1)


@pytest.mark.skipif(embedding_scale.IN_DECODER, reason="transformers below 5.4 has such a decoder itself: tested above")
@pytest.mark.parametrize("name", SCALED_IN_DECODER)
def test_a_decoder_that_scales_whatever_it_is_given(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.3 in miniature: the factor is taken from the embedding module and put into the decoder."""
    model = scaling_model(name)
    inputs = batch(model=model)
    expected, logits = model(**inputs).loss, model(**{**inputs, "labels": None}).logits
    model.get_input_embeddings().embed_scale.fill_(1.0)
    decoder = model.llm.get_decoder()

    def scale(module, args, kwargs):
        return args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"] * torch.tensor(32**0.5)}

    decoder.register_forward_pre_hook(scale, with_kwargs=True)
    monkeypatch.setattr(embedding_scale, "IN_DECODER", True)
    torch.testing.assert_close(model(**inputs).loss, expected)
    torch.testing.assert_close(model(**{**inputs, "labels": None}).logits, logits, rtol=1e-4, atol=1e-5)
