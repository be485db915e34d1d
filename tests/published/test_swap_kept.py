"""The keys and values that swapped attention keeps: what they hang on, and that a change of it is noticed."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from published_tiny import assert_same, data, published_model, wrappers
from torch import nn

import layalign
from layalign.published import swapped_modules


def step(model: nn.Module) -> torch.Tensor:
    embeds = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
    return model.model_llm(inputs_embeds=embeds).logits


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Grows by the attention module whenever keys and values of a source are computed."""
    seen: list[nn.Module] = []
    original = swapped_modules.key_value_states
    monkeypatch.setattr(swapped_modules, "key_value_states", lambda *a: seen.append(a[0]) or original(*a))
    return seen


def other_data(attention) -> None:
    attention.v_proj.weight.data = attention.v_proj.weight.data * 2


def there_and_back(attention) -> None:
    attention.bfloat16().float()


def new_parameters(attention) -> None:
    attention.load_state_dict({name: 1.5 * value for name, value in attention.state_dict().items()}, assign=True)


def new_bias(attention) -> None:
    attention.v_proj.bias = nn.Parameter(torch.ones(attention.v_proj.out_features))


def new_map(attention) -> None:
    attention.k_proj = nn.Linear(32, attention.k_proj.out_features)


def hooked(attention) -> None:
    attention.v_proj.register_forward_hook(lambda module, args, out: out * 2)


def patched(attention) -> None:
    attention.v_proj.forward = lambda states: nn.functional.linear(states, attention.v_proj.weight) * 2


def parametrized(attention) -> None:
    nn.utils.parametrize.register_parametrization(attention.v_proj, "weight", nn.Tanh())


CHANGES = [other_data, there_and_back, new_parameters, new_bias, new_map, hooked, patched, parametrized]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_maps_are_noticed_under_the_same_states(change, mode, made) -> None:
    model, twin = published_model(), published_model()
    layalign.swap_modules(model)
    with mode():
        model(**data()), twin(**data())
        before = step(model)
        made.clear()
        step(model)
        assert not made  # kept so far
        for one in (model, twin):
            for wrapper in wrappers(one):
                torch.manual_seed(1)
                change(wrapper.model)
        expected = step(twin)
        for _ in range(2):
            torch.testing.assert_close(step(model), expected, rtol=1e-5, atol=1e-5)
        assert (before - expected).abs().max() > 1e-3


def with_lora(model: nn.Module):
    """A peft model around the LLM, with two adapters on the key and value maps."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model.model_llm.model = peft.get_peft_model(model.model_llm.model, config)
    model.model_llm.model.add_adapter("other", config)
    return model.eval()


def scale(peft_model) -> None:
    for module in peft_model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(3.0)


LORA = [
    lambda model: model.base_model.disable_adapter_layers(),
    lambda model: model.base_model.enable_adapter_layers(),
    lambda model: model.set_adapter("other"),
    lambda model: model.merge_adapter(),
    lambda model: model.unmerge_adapter(),
    lambda model: model.set_adapter("default"),
    scale,
    lambda model: model.merge_adapter(["other"]),
]


def test_changed_adapters_are_noticed_under_the_same_states(made) -> None:
    model, twin = with_lora(published_model()), with_lora(published_model())
    assert len(layalign.swap_modules(model).swapped) == 4
    with torch.no_grad():
        model(**data()), twin(**data())
        seen = [step(model)]
        for change in LORA:
            change(model.model_llm.model), twin.eval(), model.eval()
            change(twin.model_llm.model)
            expected = step(twin)
            torch.testing.assert_close(step(model), expected, rtol=1e-5, atol=1e-5)
            made.clear()
            step(model)
            assert not made  # with LoRA too they are kept while nothing changes
            seen.append(expected)
    for index, (before, after) in enumerate(itertools.pairwise(seen)):
        merged = index in (3, 4)  # and unmerged: the same numbers
        assert ((before - after).abs().max() > 1e-3) != merged, index


@pytest.mark.parametrize("lora", [False, True])
def test_generation_makes_them_once(lora: bool, made) -> None:
    model = with_lora(published_model()) if lora else published_model()
    layalign.swap_modules(model)
    made.clear()
    with torch.no_grad():
        model(**data(labels=False))
    assert len(made) == 3


def generated(model: nn.Module, **options) -> torch.Tensor:
    """From one source: generate repeats the LLM's rows, not the adapter states."""
    one = {name: tensor[:1] for name, tensor in data(labels=False).items()}
    with torch.no_grad():
        embeds, mask = model._source(one["input_ids_mt"], one["attention_mask_mt"])
        llm = model.model_llm.model
        return llm.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=5, pad_token_id=0, do_sample=False, **options
        )


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_one_source_serves_all_rows(options, made) -> None:
    model = published_model()
    expected = generated(model, **options)
    layalign.swap_modules(model)
    made.clear()
    assert torch.equal(generated(model, **options), expected)
    assert len(made) == 3


def test_one_source_for_several_rows_has_the_same_gradients() -> None:
    model = published_model()
    twin = copy.deepcopy(model)
    layalign.swap_modules(model)
    found = []
    for one in (model, twin):
        generator = torch.Generator().manual_seed(0)
        pairs = [tuple(torch.randn(1, 5, 32, generator=generator).requires_grad_() for _ in "kv") for _ in range(3)]
        one.model_llm.set_states(pairs)
        step(one).square().mean().backward()
        found.append({f"{i} {j}": state.grad for i, pair in enumerate(pairs) for j, state in enumerate(pair)})
        with torch.no_grad():
            found[-1]["one row"] = one.model_llm(inputs_embeds=torch.ones(1, 4, 32)).logits
    assert_same(*found)


def test_maps_made_in_inference_mode_have_no_versions_and_nothing_is_kept() -> None:
    with torch.inference_mode():
        model, twin = published_model(), published_model()
        layalign.swap_modules(model)
        model(**data()), twin(**data())
        assert all(wrapper.layalign_swap.kept is None for wrapper in wrappers(model))
        for wrapper in (*wrappers(model), *wrappers(twin)):
            wrapper.model.v_proj.weight.mul_(2)
        torch.testing.assert_close(step(model), step(twin), rtol=1e-5, atol=1e-5)
