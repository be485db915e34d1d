"""Padding of the source is not computed: same numbers without it, whatever stands there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import batch, tiny_model

from layalign.modeling import model as model_module
from layalign.modeling.padding import real_tokens, spread_heads

MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1]])


def padded(model: Any, **options: Any) -> dict[str, torch.Tensor]:
    return batch(model=model, sources=(6, 2, 3), **options)


def results(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_real_tokens_are_taken_and_put_back() -> None:
    real = real_tokens(MASK)
    assert real is not None
    states = torch.randn(3, 6, 4)
    packed = real.select(states)
    assert torch.equal(packed[0], states[MASK.bool()])
    assert torch.equal(real.spread(packed), states * MASK[..., None])
    heads = states.unflatten(2, (2, 2)).transpose(1, 2)
    found = spread_heads(real, packed.unflatten(2, (2, 2)).transpose(1, 2))
    assert torch.equal(found, heads * MASK[:, None, :, None]) and found.stride(-1) == 1


@pytest.mark.parametrize("mask", [torch.ones(3, 6), torch.zeros(3, 6)], ids=["nothing padded", "nothing real"])
def test_where_it_does_not_pay_nothing_is_left_out(mask: torch.Tensor) -> None:
    assert real_tokens(mask) is None


@pytest.mark.parametrize("fold", ["never", "always"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_loss_and_gradients_are_those_of_the_padded_batch(
    side: str, fold: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(fold_projections=fold).double()
    inputs = padded(model)
    if side == "left":
        for name in ("encoder_input_ids", "encoder_attention_mask"):
            inputs[name] = inputs[name].flip(1)
    assert real_tokens(inputs["encoder_attention_mask"]) is not None
    packed = results(model, inputs)
    monkeypatch.setattr(model_module, "real_tokens", lambda mask: None)
    for one, other in zip(packed, results(model, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_the_aligner_sees_real_tokens_only() -> None:
    model, seen = tiny_model(fold_projections="never"), []
    assert model.encoder_aligner is not None
    model.encoder_aligner.projector.register_forward_hook(lambda module, args, output: seen.append(output.shape[1:3]))
    model.mapping.register_forward_hook(lambda module, args, output: seen.append(output.shape[:2]))
    model(**padded(model))
    assert seen == [(1, 11), (1, 11)]
    model.config.mask_encoder_padding = False  # as published: padding is attended to, so it is computed
    model(**padded(model))
    assert seen[2:] == [(3, 6), (3, 6)]


def test_what_the_encoder_leaves_in_the_padding_does_not_matter() -> None:
    model = tiny_model()
    inputs = padded(model)
    right = results(model, inputs)
    poison = torch.where(inputs["encoder_attention_mask"].bool(), 0.0, torch.nan)[..., None]

    def spoil(module: Any, args: Any, output: Any) -> Any:
        output.hidden_states = tuple(states + poison for states in output.hidden_states)
        output.last_hidden_state = output.last_hidden_state + poison
        return output

    handle = model.encoder.register_forward_hook(spoil)
    spoiled = results(model, inputs)
    handle.remove()
    for one, other in zip(spoiled, right, strict=True):
        assert torch.equal(one, other)


def test_a_mixed_batch_generates_what_each_source_generates_alone() -> None:
    model = tiny_model()
    inputs = {k: v for k, v in padded(model, targets=None).items() if k.startswith("encoder_")}
    options: dict[str, Any] = dict(max_new_tokens=6, do_sample=False, eos_token_id=[], pad_token_id=0)
    together = model.generate(**inputs, **options)[:, -6:]
    for row, length in enumerate((6, 2, 3)):
        source = {name: ids[row : row + 1, :length] for name, ids in inputs.items()}
        assert torch.equal(model.generate(**source, **options)[:, -6:], together[row : row + 1])
