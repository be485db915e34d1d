"""What is made from weights and kept: every change of the weights is noticed, and none of their memory is held."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from published_tiny import published_model, wrappers
from tiny import batch, tiny_llm, tiny_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import layalign
from layalign import ArgumentError
from layalign.modeling import key_values


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(model=model, targets=None)).logits


def fc2(model) -> nn.Linear:
    return model.encoder_aligner.projector.fc2


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows whenever weights are folded."""
    counted: list[int] = []
    original = key_values._fold
    monkeypatch.setattr(key_values, "_fold", lambda *a: (counted.append(1), original(*a))[1])
    return counted


def test_other_memory_at_the_same_address_is_noticed(folds: list[int]) -> None:
    """As `.bfloat16().float()` finds it at times: the same Parameter, address and version. One number of a map differs,
    which is not among those that are compared."""
    model = tiny_model(fold_projections="always")
    weight = model._attentions[0].k_proj.weight
    memory = weight.detach().clone().numpy()
    weight.data = torch.from_numpy(memory)
    logits(model), logits(model)
    assert len(folds) == 1
    seen = id(weight), weight.data_ptr(), weight._version
    memory[1, 5] += 1.0
    weight.data = torch.from_numpy(memory)
    assert seen == (id(weight), weight.data_ptr(), weight._version)
    logits(model)
    assert len(folds) == 2


def test_another_parameter_with_the_number_of_one_that_is_gone_is_noticed(folds: list[int]) -> None:
    model = tiny_model(fold_projections="always")
    own = model._attentions[0].k_proj._parameters
    memory = own["weight"].detach().clone().numpy()
    own["weight"] = nn.Parameter(torch.from_numpy(memory), requires_grad=False)
    logits(model)
    seen = id(own["weight"]), own["weight"].data_ptr(), own["weight"]._version
    memory[1, 5] += 1.0
    others = []  # of other numbers: they stay, so that the next has another
    for _ in range(1000):
        other = torch.from_numpy(memory)
        own["weight"] = None
        own["weight"] = nn.Parameter(other, requires_grad=False)
        if id(own["weight"]) == seen[0]:
            break
        others.append(own["weight"])
    assert seen == (id(own["weight"]), own["weight"].data_ptr(), own["weight"]._version)
    before = len(folds)
    logits(model)
    assert len(folds) == before + 1


def in_place(model) -> None:
    fc2(model).weight.data.mul_(1.5)


def one_number(model) -> None:
    fc2(model).weight.data[3, 5] += 0.5


def by_numpy(model) -> None:
    fc2(model).bias.detach().numpy()[2] += 0.5


def allocated_again(model) -> None:
    weight = fc2(model).weight
    values, storage = weight.detach() * 1.5, weight.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    weight.data.copy_(values)


def frozen_maps(model) -> None:
    for attention in model._attentions:
        attention.v_proj.weight.data.mul_(1.5)


def one_head(model) -> None:
    model._attentions[1].v_proj.weight.data[8:16] = 0.0


def frozen_bias(model) -> None:
    model._attentions[1].k_proj.bias.data[3] += 0.5


def merged(model) -> None:
    """peft writes the weight's ``.data``: afterwards the same Parameter is in a plain Linear again."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    weight = model._attentions[0].v_proj.weight
    seen = id(weight), weight.data_ptr(), weight._version
    peft.get_peft_model(model.llm, config).merge_and_unload()
    again = model._attentions[0].v_proj.weight
    assert seen == (id(again), again.data_ptr(), again._version)


WRITES = [in_place, one_number, by_numpy, allocated_again, frozen_maps, one_head, frozen_bias, merged]


@pytest.mark.parametrize("write", WRITES)
def test_writes_past_the_counters_are_noticed(write: Callable[[nn.Module], None], folds: list[int]) -> None:
    model = tiny_model(llm="qwen2", fold_projections="always")  # whose maps have biases
    before, count = logits(model), len(folds)
    assert torch.equal(logits(model), before) and len(folds) == count == 1
    write(model)
    found = logits(model)
    assert len(folds) == 2 and model.key_values.last == "folded"
    model.key_values.forget()
    assert torch.equal(logits(model), found) and not torch.equal(found, before)


def test_lora_on_and_off_leaves_no_old_weights() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model(fold_projections="always")
    before = logits(model)
    config = peft.LoraConfig(r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(model.llm, config)
    model.eval()
    adapted = logits(model)
    assert "not a plain Linear" in model.key_values.last and model.key_values._folded is None
    tuned.merge_adapter()
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
    tuned.unmerge_adapter()
    tuned.merge_and_unload()
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
    assert model.key_values.last == "folded" and (adapted - before).abs().max() > 1e-2


def test_the_memory_of_weights_that_are_gone_is_free() -> None:
    """Offloading gives the weights other memory: the old one is not kept for a comparison."""
    model, swapped = tiny_model(fold_projections="always"), published_model()
    layalign.swap_modules(swapped)
    logits(model)
    with torch.no_grad():
        swapped.model_llm.set_states([(torch.ones(1, 5, 32), torch.ones(1, 5, 32)) for _ in range(3)])
        swapped.model_llm(inputs_embeds=torch.ones(1, 4, 32))
    assert all(wrapper.layalign_swap.kept is not None for wrapper in wrappers(swapped))
    for linear in (fc2(model), model._attentions[0].k_proj, wrappers(swapped)[0].model.k_proj):
        old = StorageWeakRef(linear.weight.untyped_storage())
        linear.weight.data = linear.weight.data.clone()
        assert old.expired()


def test_swapped_tensors_are_noticed(folds: list[int]) -> None:
    model = tiny_model(fold_projections="always")
    before = logits(model)
    weight = fc2(model).weight
    torch.utils.swap_tensors(weight, nn.Parameter(weight.detach() * 1.5))  # refused where a weak reference is kept
    assert not torch.equal(logits(model), before) and len(folds) == 2


@pytest.mark.parametrize("fold", ["always", "never"])
@pytest.mark.parametrize("form", ["by slots", "together"])
def test_weights_that_change_before_the_backward(fold: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in torch: the backward goes by the weights of the forward, or fails where these are written."""
    if form == "together":
        from layalign.modeling import key_values

        monkeypatch.setattr(key_values, "useful", lambda *_: False)
    found = []
    for change in (False, True):
        model = tiny_model(fold_projections=fold)
        loss = model(**batch(model=model)).loss
        if change:
            for attention in model._attentions:
                attention.v_proj.weight = nn.Parameter(attention.v_proj.weight * 2, requires_grad=False)
        loss.backward()
        found.append(fc2(model).weight.grad)
    assert torch.equal(*found)
    loss = model(**batch(model=model)).loss
    with torch.no_grad():
        model._attentions[0].v_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def turned(wrapper) -> None:
    wrapper.model.v_proj.weight.data = wrapper.model.v_proj.weight.data.T


def written(wrapper) -> None:
    wrapper.model.v_proj.weight.data.mul_(2)


def shorter(wrapper) -> None:
    for state in wrapper.adapter_states:
        state.data = state.data[:, :3]


@pytest.mark.parametrize("change", [turned, written, shorter])
def test_kept_keys_and_values_follow_their_weights_and_states(change: Callable[[nn.Module], None]) -> None:
    models = published_model(), published_model()
    layalign.swap_modules(models[0])
    found = []
    with torch.no_grad():
        for model in models:
            generator = torch.Generator().manual_seed(0)
            pairs = [tuple(torch.randn(1, 5, 32, generator=generator) for _ in "kv") for _ in range(3)]
            model.model_llm.set_states(pairs)
            results = [model.model_llm(inputs_embeds=torch.ones(1, 4, 32)).logits]
            for wrapper in wrappers(model):
                change(wrapper)
            found.append([*results, model.model_llm(inputs_embeds=torch.ones(1, 4, 32)).logits])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert (found[0][0] - found[0][1]).abs().max() > 1e-3


@pytest.mark.parametrize("fold", ["always", "never"])
@pytest.mark.parametrize("place", ["layer", "attention"])
def test_other_layers_in_the_llm_make_the_keys_and_values(place: str, fold: str) -> None:
    model, fresh = tiny_model(fold_projections=fold), tiny_model(fold_projections=fold)
    before, layers = logits(model), model.llm.model.layers
    new = copy.deepcopy(layers[1] if place == "layer" else layers[1].self_attn)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(1.5)
    if place == "layer":
        layers[1] = new
    else:
        layers[1].self_attn = new
    fresh.llm.load_state_dict(model.llm.state_dict())
    found = logits(model)
    assert torch.equal(found, logits(fresh)) and (found - before).abs().max() > 1e-2


def test_a_layer_of_another_llm_is_refused() -> None:
    model = tiny_model()
    logits(model)
    model.llm.model.layers[1] = tiny_llm(seed=5).model.layers[1]
    with pytest.raises(ArgumentError, match="^llm: expected the attention of layer 1 to take the source"):
        logits(model)
