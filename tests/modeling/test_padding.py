"""Padding of the source is not computed: same numbers without it, whatever stands there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import batch, tiny_model

from layalign import ops
from layalign.modeling import key_values
from layalign.modeling import model as model_module
from layalign.modeling.padding import real_tokens, spread_all, spread_heads

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


@pytest.mark.parametrize("stacked", [False, True])
def test_many_are_put_back_at_once(stacked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    real = real_tokens(MASK)
    assert real is not None
    # As the LLM's maps leave them: (1, N, G, d) in memory.
    states = [torch.randn(1, len(real), 2, 4, dtype=torch.float64).requires_grad_() for _ in range(4)]
    heads = [each.transpose(1, 2) for each in states]
    expected = [spread_heads(real, each) for each in heads]
    found = spread_all(real, torch.stack(heads) if stacked else list(heads))
    assert all(map(torch.equal, found, expected)) and found[0].stride() == expected[0].stride()
    grads = [torch.randn_like(each) for each in expected]
    for one, other in zip(torch.autograd.grad(found, states, grads), torch.autograd.grad(expected, states, grads),
                          strict=True):  # fmt: skip
        assert torch.equal(one, other)


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
    monkeypatch.setattr(model_module, "real_tokens", lambda *_: None)
    for one, other in zip(packed, results(model, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("options", [
    {"fold_projections": "never"}, {"fold_projections": "always"}, {"structure": "MLP"}, {"mix": "shared"},
], ids=str)  # fmt: skip
def test_operations_may_read_the_tokens_where_they_are(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the operations get all tokens, and the positions of those to compute."""
    model, given = tiny_model(impl="torch", **options).double(), []
    inputs = padded(model)
    expected = results(model, inputs)
    monkeypatch.setattr(key_values, "_reads_rows", lambda *_: True)
    project = ops.layer_projection
    monkeypatch.setattr(ops, "layer_projection", lambda *a, **k: given.append(k["rows"]) or project(*a, **k))
    found = results(model, inputs)
    assert [rows.tolist() for rows in given] == [[0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14]]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


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
