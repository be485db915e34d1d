"""What is made in one grad mode and kept serves in every other: evaluation, then training, and the other way round."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from published_tiny import data, published_model
from tiny import batch, compiles, tiny_model
from torch import Tensor, nn

import layalign
from layalign.modeling import key_values

MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": nullcontext}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The loss, and all gradients."""
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def trained(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return gradients(model, model(**inputs).loss)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def evaluate(model, inputs: dict[str, Tensor]) -> None:
    model(**inputs)
    free = {name: value for name, value in inputs.items() if name != "labels"}
    model.generate(**free, max_new_tokens=3, do_sample=False, pad_token_id=0)


FORMS = {
    "folded": dict(fold_projections="always"),
    "in two steps": dict(fold_projections="never"),
    "MLP": dict(structure="MLP"),
    "shared": dict(mix="shared"),
}


@pytest.mark.parametrize("device", ["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", MODES)
def test_training_after_and_before_evaluation(mode: str, form: str, device: str, monkeypatch) -> None:
    if device == "as on a GPU":
        monkeypatch.setattr(key_values, "useful", lambda *_: False)
    model, fresh = tiny_model(**FORMS[form]), tiny_model(**FORMS[form])
    inputs = batch(model=model)
    expected = trained(fresh, inputs)
    for _ in range(2):
        with MODES[mode]():
            evaluate(model, inputs)
        assert_same(trained(model, inputs), expected)
    assert (model.key_values.last == "folded") == (form == "folded")


@pytest.mark.parametrize("mode", MODES)
def test_training_around_evaluation_with_steps_of_an_optimizer(mode: str, monkeypatch) -> None:
    monkeypatch.setattr(key_values, "useful", lambda *_: False)
    found = []
    for evaluated in (True, False):
        model = tiny_model(fold_projections="always")
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        inputs = batch(model=model)
        for _ in range(3):
            if evaluated:
                with MODES[mode]():
                    evaluate(model, inputs)
            last = trained(model, inputs)
            optimizer.step()
        found.append(last)
    assert_same(*found)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("made", MODES)
def test_swapped_attention_with_the_same_source_in_other_modes(made: str, mode: str) -> None:
    """The source's states are set in one mode, evaluated in another, and then the gates train."""
    found = []
    for swap in (True, False):
        model = published_model()
        if swap:
            assert layalign.swap_modules(model).swapped
        generator = torch.Generator().manual_seed(0)
        with MODES[made]():
            pairs = [tuple(torch.randn(1, 5, 32, generator=generator) for _ in "kv") for _ in range(3)]
            model.model_llm.set_states(pairs)
        for _ in range(2):
            with MODES[mode]():
                for length in (4, 1, 1, 1):
                    model.model_llm(inputs_embeds=torch.ones(3, length, 32))
            model.zero_grad()
            for length in (4, 1, 1):
                model.model_llm(inputs_embeds=torch.ones(3, length, 32)).logits.square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0]
    assert_same(*found)


@pytest.mark.parametrize("mode", MODES)
def test_swapped_models_train_after_evaluation(mode: str) -> None:
    model, fresh = published_model(), published_model()
    layalign.swap_modules(model)
    expected = gradients(fresh, fresh(**data()))
    for _ in range(2):
        with MODES[mode]():
            model(**data()), model(**data(labels=False))
        assert_same(gradients(model, model(**data())), expected)


@pytest.mark.parametrize("mode", ["inference", "no_grad"])
def test_a_cache_is_gone_on_with_where_gradients_are_recorded(mode: str) -> None:
    found = []
    for first in (MODES[mode], torch.no_grad):
        model = tiny_model()
        inputs = batch(model=model, targets=None)
        with first():
            output = model(**inputs, use_cache=True)
        cache = output.get("past_key_values") or output["cache"]
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 2, dtype=torch.long)], dim=1)
        more = dict(input_ids=torch.full((3, 2), 9), attention_mask=mask, labels=torch.full((3, 2), 5))
        found.append(trained(model, {**more, "past_key_values": cache}))
    assert any("adaption_gate" in name for name in found[0])
    assert_same(found[0], found[-1])


@pytest.mark.slow
@compiles
def test_compiled_training_after_evaluation() -> None:
    model, fresh = tiny_model(), tiny_model(fold_projections="never")
    ids = torch.randint(4, 60, (2, 7))

    def states(call) -> Tensor:
        return sum(state.square().sum() for state in call(ids, torch.ones_like(ids))[1].keys)

    expected = gradients(fresh, states(fresh.encode_source))
    compiled = torch.compile(model.encode_source, backend="eager")
    for call in (model.encode_source, compiled):
        with torch.inference_mode():
            states(call)
    for call in (compiled, model.encode_source):
        assert_same(gradients(model, states(call)), expected)
