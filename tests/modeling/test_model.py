"""Attach and detach, the loss, the input's layout, the adapter alone."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import batch, row, tiny_encoder, tiny_llm, tiny_model
from transformers import AutoModelForCausalLM

from layalign import ArgumentError, LayAlignForCausalLM, attach, build_inputs, detach
from layalign.modeling.attention_interface import is_attached
from layalign.modeling.llm_inputs import real_positions


def test_attach_acts_on_one_instance_and_detach_leaves_nothing_behind() -> None:
    llm = tiny_llm()
    other = AutoModelForCausalLM.from_config(llm.config)  # shares the config object
    assert other.config is llm.config
    keys, config, attributes = list(llm.state_dict()), llm.config, {n: set(m.__dict__) for n, m in llm.named_modules()}
    report = attach(llm, [0, 2])
    assert [layer for layer, _ in report.attached] == [0, 2]
    assert report.attached[0][1] == "model.layers.0.self_attn"
    assert report.skipped == [("model.layers.1.self_attn", "not among the language layers")]
    assert list(llm.state_dict()) == keys
    assert other.config._attn_implementation == "sdpa" and not is_attached(other)
    with pytest.raises(ArgumentError, match="not attached yet"):
        attach(llm)
    detach(llm)
    assert all(module.config is config for module in llm.modules() if hasattr(module, "config"))
    assert {n: set(m.__dict__) for n, m in llm.named_modules()} == attributes
    with pytest.raises(ArgumentError, match="expected an attached LLM"):
        detach(llm)


def test_wrapping_keeps_keys_and_unwrapping_gives_the_same_llm_back() -> None:
    llm = tiny_llm()
    ids = torch.tensor([[5, 6, 7]])
    keys, before = list(llm.state_dict()), llm(ids).logits
    model = LayAlignForCausalLM.from_encoder_and_llm(tiny_encoder(), llm)
    assert list(llm.state_dict()) == keys
    assert torch.equal(llm(ids).logits, before)  # attached, without a source: the bare LLM
    assert not any(parameter.requires_grad for parameter in llm.parameters())
    assert model.unload() is llm and not is_attached(llm)
    assert all(parameter.requires_grad for parameter in llm.parameters())
    assert torch.equal(llm(ids).logits, before)
    LayAlignForCausalLM.from_encoder_and_llm(tiny_encoder(), llm)  # and it can be wrapped again


def test_frozen_weights_survive_construction() -> None:
    encoder, llm = tiny_encoder(), tiny_llm()
    state = copy.deepcopy({**llm.state_dict(prefix="llm."), **encoder.encoder.state_dict(prefix="encoder.")})
    model = LayAlignForCausalLM.from_encoder_and_llm(encoder, llm)
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert all((module.adaption_gate == 0).all() for module in model.cross_attention)


def test_loss_is_the_mean_over_labels_and_logits_are_made_only_there() -> None:
    model = tiny_model()
    inputs = batch(model=model)
    seen = []
    model.llm.lm_head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    output = model(**inputs)
    assert output.logits is None
    assert seen == [(1, 8, 64)]  # 3 + 1 + 4 labels
    assert not model.llm.lm_head._forward_pre_hooks
    full = model(**inputs, logits_to_keep=0)
    expected = torch.nn.functional.cross_entropy(
        full.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(full.loss, expected)
    torch.testing.assert_close(model(**inputs, logits_to_keep=5).loss, expected)
    torch.testing.assert_close(model(**inputs, num_items_in_batch=16).loss, expected / 2)
    assert torch.equal(model(**inputs, return_dict=False)[0], output.loss)


def test_no_label_at_all_gives_zero_loss() -> None:
    model = tiny_model()
    inputs = batch(model=model)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    assert model(**inputs).loss == 0


def test_accumulated_micro_batches_equal_the_whole_batch() -> None:
    model = tiny_model()
    inputs = batch(model=model)
    whole = torch.autograd.grad(model(**inputs).loss, model.encoder_aligner.projector.fc2.weight)[0]
    parts = sum(
        torch.autograd.grad(
            model(**row(inputs, index), num_items_in_batch=8).loss, model.encoder_aligner.projector.fc2.weight
        )[0]
        for index in range(3)
    )
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_where_the_text_padding_lies_does_not_matter() -> None:
    model = tiny_model()
    inputs = batch(model=model, sources=(6, 4), prompts=(2, 3), targets=None)
    right = {name: tensor.clone() for name, tensor in inputs.items()}
    pad = int((inputs["attention_mask"][1] == 0).sum())
    for name in ("input_ids", "attention_mask"):
        right[name][1] = inputs[name][1].roll(-pad)
    with torch.no_grad():
        left, right = model(**inputs).logits, model(**right).logits
    assert pad == 1
    torch.testing.assert_close(right[1, :-pad], left[1, pad:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", [[2, 3, 4, 5], [0, 2, 3, 5]])
def test_where_the_encoder_padding_lies_does_not_matter(positions: list[int]) -> None:
    """An encoder without positions sees a set of tokens, so padding may stand anywhere in the source."""
    model = tiny_model()
    for name, parameter in model.encoder.named_parameters():
        if "relative_attention_bias" in name:
            torch.nn.init.zeros_(parameter)
    inputs = batch(model=model, sources=(6, 4), prompts=(2, 3), targets=None)
    moved = {name: tensor.clone() for name, tensor in inputs.items()}
    moved["encoder_input_ids"][1] = 0
    moved["encoder_attention_mask"][1] = 0
    moved["encoder_input_ids"][1, positions] = inputs["encoder_input_ids"][1, :4]
    moved["encoder_attention_mask"][1, positions] = 1
    with torch.no_grad():
        torch.testing.assert_close(model(**moved).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_unmasked_padding_is_attended_to_only_when_asked() -> None:
    masked, published = tiny_model(), tiny_model(mask_encoder_padding=False)
    inputs = batch(model=masked, targets=None)
    changed = dict(inputs, encoder_input_ids=inputs["encoder_input_ids"].clone())
    changed["encoder_input_ids"][1, 3:] = 33  # padding only
    with torch.no_grad():
        assert torch.allclose(masked(**inputs).logits, masked(**changed).logits, atol=1e-6)
        assert (published(**inputs).logits - published(**changed).logits)[1].abs().max() > 1e-3


def test_an_empty_source_contributes_nothing() -> None:
    model = tiny_model()
    inputs = batch(model=model, sources=(4, 0), prompts=(2, 3), targets=None)
    with torch.no_grad():
        logits = model(**inputs).logits
        _, mask, embeds, _ = model._begin(**inputs)
        bare = model.unload()(inputs_embeds=embeds, attention_mask=mask, position_ids=real_positions(mask)).logits
    assert torch.isfinite(logits[mask.bool()]).all()
    real = mask[1].bool()
    torch.testing.assert_close(logits[1, real], bare[1, real], rtol=1e-5, atol=1e-5)


def test_adapter_alone() -> None:
    model = tiny_model(language_layers=[])
    assert model.encoder_aligner is None and len(model.cross_attention) == 0
    inputs = batch(model=model)
    model(**inputs).loss.backward()
    assert model.mapping.mlp.linear1.weight.grad.abs().sum() > 0
    assert model.generate(**batch(model=model, targets=None), max_new_tokens=3).shape[0] == 3


def test_soft_tokens_stand_in_their_slots() -> None:
    model = tiny_model()
    inputs = batch(model=model, sources=(3, 1), prompts=(2, 2), targets=None)
    with torch.no_grad():
        ids, _, embeds, _ = model._begin(**inputs)
        soft, _ = model.encode_source(inputs["encoder_input_ids"], inputs["encoder_attention_mask"])
        words = model.get_input_embeddings()(ids)
    boundary = model.mapping.end_boundary[0, 0]
    expected = torch.stack([words[0, 0], *soft[0, :3], boundary, *words[0, 5:]])
    assert torch.equal(embeds[0], expected)
    expected = torch.stack([words[1, 0], words[1, 1], words[1, 2], soft[1, 0], boundary, *words[1, 5:]])
    assert torch.equal(embeds[1], expected)


def test_llm_without_bos() -> None:
    model = LayAlignForCausalLM.from_encoder_and_llm(tiny_encoder(), tiny_llm("qwen2", bos_token_id=None))
    inputs = batch(model=model, sources=(3, 2), prompts=(2, 2), targets=(1, 1))
    assert inputs["input_ids"].shape[1] == 3 + 1 + 2 + 1
    assert torch.isfinite(model(**inputs).loss)


def test_pack() -> None:
    packed = build_inputs([2, 1], [[7], [8, 9]], [[5, 3], [3]], bos_token_id=1, source_token_id=0)
    assert packed["input_ids"].tolist() == [[1, 0, 0, 0, 7, 5, 3], [0, 1, 0, 0, 8, 9, 3]]
    assert packed["attention_mask"].tolist() == [[1] * 7, [0] + [1] * 6]
    assert packed["labels"].tolist() == [[-100] * 5 + [5, 3], [-100] * 6 + [3]]
    for arguments, message in (
        (([],), "source_lengths: expected at least one row"),
        (([1], [[1], [2]]), "prompts: expected 1 rows"),
        (([1], None, []), "targets: expected 1 rows"),
        (([-1],), "source_lengths: expected numbers >= 0"),
    ):
        with pytest.raises(ArgumentError, match=message):
            build_inputs(*arguments, bos_token_id=1, source_token_id=0)


def test_wrong_parts_are_named() -> None:
    with pytest.raises(ArgumentError, match="llm: expected a transformers model or its name, got int"):
        LayAlignForCausalLM.from_encoder_and_llm(tiny_encoder(), 3)
    with pytest.raises(ArgumentError, match="llm: expected a causal language model, got LlamaModel"):
        LayAlignForCausalLM.from_encoder_and_llm(tiny_encoder(), tiny_llm().model)
