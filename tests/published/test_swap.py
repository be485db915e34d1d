"""The swap and its undoing on the published data flow: the same numbers, and that the fast way is really taken."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from published_tiny import (  # noqa: F401
    assert_same,
    calls_of_operations,
    data,
    gates,
    loss_and_gradients,
    own_classes,
    published,
    published_model,
    settings,
    wrappers,
)
from tiny import batch, tiny_model
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import layalign
import layalign.published.swap
from layalign import ArgumentError, ops
from layalign.ops import backends

needs_cpp = pytest.mark.skipif(not backends.capability("cpp", "cpu")[0], reason="no C++ kernels here")

CASES = [
    ("llama", "Linear", (0, 1, 2), "sdpa"),
    ("mistral", "MLP", (0, 2), "sdpa"),
    ("qwen2", "Linear", (2,), "eager"),
]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("llm", "structure", "layers", "attention"), CASES)
def test_the_same_loss_and_gradients(llm, structure, layers, attention, train, calls) -> None:
    model = published_model(llm, structure, layers, attention).train(train)
    model.encoder_mt.eval()  # its dropout would draw other numbers
    expected = loss_and_gradients(model, data())
    assert calls == {"layer_projection": 0, "gated_cross_attention": 0}
    report = layalign.swap_modules(model)
    assert len(report.swapped) == 1 + len(layers)
    calls.update(layer_projection=0, gated_cross_attention=0)
    assert_same(expected, loss_and_gradients(model, data()))
    assert calls == {"layer_projection": 1, "gated_cross_attention": len(layers)}


@pytest.mark.parametrize(("llm", "structure", "layers", "attention"), CASES)
def test_the_same_generation(llm, structure, layers, attention, calls) -> None:
    model = published_model(llm, structure, layers, attention)
    expected = model(**data(labels=False))
    layalign.swap_modules(model)
    calls.update(layer_projection=0, gated_cross_attention=0)
    assert torch.equal(model(**data(labels=False)), expected) and expected.shape == (3, 6)
    assert calls == {"layer_projection": 1, "gated_cross_attention": 6 * len(layers)}
    with torch.no_grad():
        for gate in gates(model):
            gate.add_(3.0)
    assert not torch.equal(model(**data(labels=False)), expected)  # the gates are not without effect


def test_the_same_parameters_and_names_and_restore() -> None:
    model = published_model("mistral", "MLP")
    before = {name: id(p) for name, p in model.named_parameters()}
    keys, classes = list(model.state_dict()), own_classes(model)
    configs = [getattr(module, "config", None) for module in model.modules()]
    with torch.no_grad():
        expected = model(**data())
    layalign.swap_modules(model)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert list(model.state_dict()) == keys
    assert own_classes(model) != classes
    assert all(issubclass(new, old) for new, old in zip(own_classes(model), classes, strict=True))
    assert isinstance(model.encoder_aligner, published.EncoderAligner)
    attended = {id(wrapper.model) for wrapper in wrappers(model)}
    for module, config in zip(model.modules(), configs, strict=True):
        assert (getattr(module, "config", None) is config) == (id(module) not in attended)
    assert model.model_llm.model.config._attn_implementation == "sdpa"

    report = layalign.restore_modules(model)
    assert [name for name, _ in report.swapped] == [
        *(f"model_llm.model.model.layers.{layer}.self_attn" for layer in range(3)), "encoder_aligner",
    ]  # fmt: skip
    assert own_classes(model) == classes
    assert all(getattr(m, "config", None) is c for m, c in zip(model.modules(), configs, strict=True))
    assert not any("layalign" in name for module in model.modules() for name in module.__dict__)
    with torch.no_grad():
        assert torch.equal(model(**data()), expected)
    with pytest.raises(ArgumentError, match="nothing in this PublishedLayAlign is swapped"):
        layalign.restore_modules(model)


def curve(swap: bool) -> list[float]:
    model = published_model("mistral")
    if swap:
        layalign.swap_modules(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(20):
        loss = model(**data(seed=step % 4))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_twenty_steps_have_the_same_curve() -> None:
    plain, swapped = curve(False), curve(True)
    torch.testing.assert_close(torch.tensor(swapped), torch.tensor(plain), rtol=1e-4, atol=1e-4)
    assert plain[16] < 0.98 * plain[0]


def test_the_report_names_what_was_done_and_what_was_left() -> None:
    report = layalign.swap_modules(published_model(layers=(1,)))
    assert dict(report.swapped).keys() == {"model_llm.model.model.layers.1.self_attn", "encoder_aligner"}
    assert report.left == [("mapping", "two plain linear maps, nothing to fuse")]
    many = layalign.swap_modules(published_model())
    row = (
        "  model_llm.model.model.layers.0.self_attn ... model_llm.model.model.layers.2.self_attn (3 modules): the gated"
    )
    assert any(line.startswith(row) for line in str(many).splitlines())
    text = str(report)
    assert "swapped: 2" in text and "left as they are: 1" in text and "encoder_aligner: the encoder's layers" in text


def test_twice_is_harmless_and_takes_the_new_backend() -> None:
    model = published_model()
    expected = loss_and_gradients(model, data())
    layalign.swap_modules(model)
    classes = own_classes(model)
    report = layalign.swap_modules(model, impl="torch")
    assert [text for _, text in report.swapped] == ["already swapped (impl 'torch')"] * 4
    assert own_classes(model) == classes
    assert model.encoder_aligner.layalign_swap.impl == "torch"
    assert_same(expected, loss_and_gradients(model, data()))
    layalign.restore_modules(model)
    assert type(model.encoder_aligner) is published.EncoderAligner


def test_wrong_arguments_are_named() -> None:
    model = published_model()
    with pytest.raises(ArgumentError, match=r"model: Sequential has nothing to swap; looked for an aligner .*fc1"):
        layalign.swap_modules(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="implementation"):
        layalign.swap_modules(model, implementation="torch")
    with pytest.raises(ArgumentError, match="impl: expected 'auto' or one of triton.*got 'fast'"):
        layalign.swap_modules(model, impl="fast")
    with pytest.raises(ArgumentError, match="fold_projections: expected one of auto, always, never, got True"):
        layalign.swap_modules(model, fold_projections=True)
    with pytest.raises(ArgumentError, match="model: expected a torch module, got dict"):
        layalign.swap_modules({})
    with pytest.raises(ArgumentError, match="model: expected a torch module, got NoneType"):
        layalign.restore_modules(None)
    assert type(model.encoder_aligner) is published.EncoderAligner


@pytest.mark.parametrize("module", [layalign, layalign.published.swap])
@pytest.mark.parametrize(("old", "new"), [("accelerate", "swap_modules"), ("restore", "restore_modules")])
def test_old_names_work_and_name_the_new_ones(module: Any, old: str, new: str) -> None:
    with pytest.warns(FutureWarning, match=rf"^{module.__name__}\.{old} is now {module.__name__}\.{new}$") as caught:
        assert getattr(module, old) is getattr(module, new)
    assert caught[0].filename == __file__
    with pytest.raises(AttributeError, match=f"'{module.__name__}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_keys_and_values_are_made_once_per_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = published_model()
    seen: list[int] = []
    width = data()["input_ids_mt"].shape[1]
    forward = nn.Linear.forward

    def count(module: nn.Linear, states: torch.Tensor) -> torch.Tensor:  # hooks would keep the module from keeping
        if any(states is state for wrapper in wrappers(model) for state in wrapper.adapter_states):
            seen.append(states.shape[1])
        return forward(module, states)

    monkeypatch.setattr(nn.Linear, "forward", count)
    with torch.no_grad():
        model(**data(labels=False))
        assert seen == [width] * 36  # two maps, three layers, six tokens: at every call
        layalign.swap_modules(model)
        seen.clear()
        model(**data(labels=False))
        assert len(seen) == 6
        model(**data(labels=False))
        assert len(seen) == 12
    seen.clear()
    model(**data()).backward()  # a gradient is wanted: made anew, and nothing stays
    model(**data()).backward()
    assert len(seen) == 12 and all(wrapper.layalign_swap.kept is None for wrapper in wrappers(model))


@pytest.mark.parametrize("somebody", ["nobody", "hook", "trains", "torch"])
def test_maps_are_called_whether_somebody_looks_or_they_train(somebody: str) -> None:
    model, seen = published_model(), []
    layalign.swap_modules(model, impl="torch" if somebody == "torch" else "auto")
    first = wrappers(model)[0]
    linear = getattr(first, first.layalign_swap.child).k_proj
    if somebody == "hook":
        linear.register_forward_hook(lambda *_: seen.append(1))
    elif somebody == "trains":
        linear.weight.requires_grad_(True)
    found = loss_and_gradients(model, data())
    layalign.restore_modules(model)
    assert_same(loss_and_gradients(model, data()), found)
    assert len(seen) == (2 + 2 if somebody == "hook" else 0)  # for the tokens and for the source, in each


def test_what_is_kept_is_noticed_to_be_stale() -> None:
    model = published_model(layers=(0, 2))
    twin = copy.deepcopy(model)
    layalign.swap_modules(model, impl="torch")
    step = dict(inputs_embeds=torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0)))

    def check() -> torch.Tensor:
        found, expected = (m.model_llm(**step).logits for m in (model, twin))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        return found.detach()

    with torch.no_grad():
        model(**data()), twin(**data())
        seen = [check()]
        for wrapper in (*wrappers(model), *wrappers(twin)):
            wrapper.adapter_states[0].mul_(-2)  # in place, the same objects
        seen.append(check())
        for wrapper in (*wrappers(model), *wrappers(twin)):
            wrapper.model.v_proj.weight.mul_(1.5)
        seen.append(check())
        for wrapper in (*wrappers(model), *wrappers(twin)):
            wrapper.update_adapter_states(tuple(state + 1 for state in wrapper.adapter_states))
        seen.append(check())
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in itertools.pairwise(seen))
    with torch.inference_mode():
        model(**data(seed=5)), twin(**data(seed=5))
    found = [m.model_llm(**step).logits for m in (model, twin)]  # the same states, and now the gate has a gradient
    for one in found:
        one.square().sum().backward()
    torch.testing.assert_close(gates(model)[0].grad, gates(twin)[0].grad, rtol=1e-4, atol=1e-6)
    assert_same(loss_and_gradients(twin, data()), loss_and_gradients(model, data()))


@pytest.fixture
def full_calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Grows by the query of every full call of the attention; repetitions of one are not full."""
    seen: list[torch.Tensor] = []
    original = ops.gated_cross_attention
    monkeypatch.setattr(ops, "gated_cross_attention", lambda *a, **k: seen.append(a[0]) or original(*a, **k))
    return seen


@needs_cpp
def test_decoding_steps_repeat_with_states_laid_out_for_them(full_calls: list[torch.Tensor]) -> None:
    model = published_model()
    twin = copy.deepcopy(model)
    layalign.swap_modules(model)
    expected = twin(**data(labels=False))
    full_calls.clear()  # of the trials
    with torch.no_grad():
        assert torch.equal(model(**data(labels=False)), expected)
        assert sorted(query.shape[2] for query in full_calls) == [1] * 3 + [10] * 3  # the input, and the first step
        swaps = [wrapper.layalign_swap for wrapper in wrappers(model)]
        assert all(swap.kept.key.is_contiguous() and swap.kept.value.is_contiguous() for swap in swaps)

        def check(full: int) -> None:
            step = dict(inputs_embeds=torch.randn(3, 1, 32))
            full_calls.clear()
            found, wanted = (m.model_llm(**step).logits for m in (model, twin))
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
            assert len(full_calls) == full

        check(0)
        for gate in (*gates(model), *gates(twin)):
            gate.mul_(-3)
        check(0)  # the gate's number is read at every call
        for gate in (*gates(model), *gates(twin)):
            gate.data = gate.data.double().float()  # other memory
        check(0)
        for wrapper in (*wrappers(model), *wrappers(twin)):
            wrapper.update_adapter_states(tuple(state + 1 for state in wrapper.adapter_states))
        check(3)
        check(0)
        with torch.profiler.profile():
            check(3)
        check(3)  # a watched call leaves nothing to repeat
        check(0)
        pickled = pickle.loads(pickle.dumps(swaps[0]))
        assert swaps[0].again is not None and pickled.again is None and pickled.kept is None
        layalign.swap_modules(model, impl="torch")
        check(3)


def test_training_steps_are_full_calls_that_follow_the_gates(full_calls: list[torch.Tensor]) -> None:
    model = published_model()
    expected = loss_and_gradients(model, data())
    layalign.swap_modules(model)
    full_calls.clear()  # of the trials
    for _ in range(2):
        assert_same(expected, loss_and_gradients(model, data()))
    assert len(full_calls) == 6
    with torch.no_grad():
        for gate in gates(model):
            gate.mul_(2)
    found = loss_and_gradients(model, data())
    layalign.restore_modules(model)
    assert_same(loss_and_gradients(model, data()), found)


def test_a_result_is_never_written_over_what_others_hold() -> None:
    model = published_model(attention="eager")
    layalign.swap_modules(model)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def attention(*args, **kwargs):
        out, weights = sdpa_attention_forward(*args, **kwargs)
        kept.append((out, out.clone()))
        return out, weights

    AttentionInterface.register("keeps_its_result", attention)
    model.model_llm.model.config._attn_implementation = "keeps_its_result"
    with torch.no_grad():
        model(**data(labels=False))
    assert len(kept) == 3 * 6 and all(torch.equal(out, before) for out, before in kept)


def test_the_attention_function_may_change_afterwards() -> None:
    model = published_model()
    layalign.swap_modules(model)
    model.model_llm.model.set_attn_implementation("eager")
    expected = published_model(attention="eager")
    assert_same(loss_and_gradients(expected, data()), loss_and_gradients(model, data()))
    used = {wrapper.model.config._attn_implementation for wrapper in wrappers(model)}
    assert used == {"layalign_eager"}


def test_copies_stay_swapped_and_go_their_own_way() -> None:
    model = published_model()
    expected = loss_and_gradients(model, data())
    for wrapper in wrappers(model):
        wrapper.adapter_states = None  # tensors with a graph cannot be copied, with or without the swap
    layalign.swap_modules(model)
    with torch.no_grad():
        model(**data())
    assert all(wrapper.layalign_swap.kept is not None for wrapper in wrappers(model))
    twin = copy.deepcopy(model)
    assert own_classes(twin) == own_classes(model)
    assert all(wrapper.layalign_swap.kept is None for wrapper in wrappers(twin))
    assert_same(expected, loss_and_gradients(twin, data()))
    layalign.restore_modules(twin)
    assert all(wrapper.model.config is twin.model_llm.model.config for wrapper in wrappers(twin))
    assert_same(expected, loss_and_gradients(twin, data()))
    assert_same(expected, loss_and_gradients(model, data()))


def test_pickles_stay_swapped() -> None:
    model = published_model()
    parts = nn.ModuleList([model.encoder_aligner, *wrappers(model)])
    layalign.swap_modules(parts)
    again = pickle.loads(pickle.dumps(parts))
    assert own_classes(again) == own_classes(parts) and again[1] is not parts[1]
    hidden = [torch.randn(2, 5, 24) for _ in range(3)]
    torch.testing.assert_close(again[0](hidden), parts[0](hidden))
    layalign.restore_modules(again)
    assert type(again[0]) is published.EncoderAligner and type(again[1]) is published.AdaptedAttention
    assert again[1].model.config._attn_implementation == "sdpa"


def test_two_aligners_and_one_used_twice() -> None:
    tree = nn.ModuleDict({"a": published.EncoderAligner(settings().encoder_aligner_config)})
    tree["b"] = published.EncoderAligner(settings("MLP", (0,)).encoder_aligner_config)
    tree["c"] = tree["a"]
    hidden = [torch.randn(2, 5, 24) for _ in range(3)]
    expected = [tree[name](hidden) for name in "abc"]
    report = layalign.swap_modules(tree)
    assert [name for name, _ in report.swapped] == ["a", "b"]
    for name, pairs in zip("abc", expected, strict=True):
        for argument in (hidden, torch.stack(hidden, dim=1)):
            torch.testing.assert_close(tree[name](argument), pairs, rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError):  # what we do not know is the original's to refuse
        tree["a"](hidden[:2])


@pytest.mark.parametrize("structure", ["Linear", "MLP"])
def test_a_bare_projector_keeps_its_format_and_hooks(structure: str, calls) -> None:
    projector = published.WeightedLinearProjector(settings(structure).encoder_aligner_config)
    seen = []
    projector.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    hidden = torch.randn(2, 3, 5, 24)
    expected = projector(hidden)
    report = layalign.swap_modules(projector)
    assert [name for name, _ in report.swapped] == [""] and "(the model itself)" in str(report)
    calls.update(layer_projection=0)
    torch.testing.assert_close(projector(hidden), expected, rtol=1e-5, atol=1e-6)
    assert calls["layer_projection"] == 1 and seen == [(2, 5, 6, 32)] * 2


def test_our_own_model_gets_settings_and_has_them_back(calls) -> None:
    model = tiny_model(fold_projections="never")
    inputs = batch(model=model)
    with torch.no_grad():
        expected = model(**inputs).loss
    report = layalign.swap_modules(nn.ModuleList([model]), impl="torch", fold_projections="always")
    assert (
        report.swapped == [("0", "already layalign's: now impl 'torch', fold_projections 'always'")] and not report.left
    )
    assert model.encoder_aligner.projector.impl == "torch" and model.key_values.choice == "always"
    assert all(module.impl == "torch" for module in model.cross_attention)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).loss, expected)
    assert model.key_values.last == "folded"
    layalign.swap_modules(model)
    layalign.restore_modules(model)
    assert model.key_values.choice == "never" and model.cross_attention[0].impl == "auto"
