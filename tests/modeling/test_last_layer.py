"""The last layer where its result is read: the same numbers, fewer positions, and whole where somebody would notice."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny import LLMS, batch, compiles, tiny_llm, tiny_model
from torch import nn

from layalign import ArgumentError, LayAlignConfig, LayAlignForCausalLM
from layalign.modeling.last_layer import LastLayer, position_wise
from layalign.nn.rows import Rows, only_rows


def both(llm: str = "llama", **options) -> tuple[LayAlignForCausalLM, LayAlignForCausalLM]:
    """The same model twice, its last layer computed where it is read and whole."""
    return tiny_model(llm=llm, fold_projections="never", **options), tiny_model(
        llm=llm, fold_projections="never", prune_last_layer="never", **options
    )


def loss_and_gradients(model: LayAlignForCausalLM, inputs: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], bound: float) -> None:
    assert first.keys() == second.keys() and len(first) > 1
    for name in first:
        scale = second[name].abs().max().clamp(min=1e-3)
        assert (first[name] - second[name]).abs().max() <= bound * scale, name


@contextmanager
def positions(model: LayAlignForCausalLM) -> Iterator[list[int]]:
    """How many positions the last layer's feed-forward block is called for."""
    seen: list[int] = []
    block = model.last_layer.maps()[0]
    cls = type("Seen", (type(block),), {"forward": lambda self, x: (seen.append(x[..., 0].numel()), inner(x))[1]})
    inner, before = block.forward, type(block)
    block.__class__ = cls
    try:
        yield seen
    finally:
        block.__class__ = before


@pytest.mark.parametrize("llm", LLMS)
def test_every_decoder_gives_the_same_loss_gradients_and_answers(llm: str) -> None:
    """Random weights everywhere, so a position that is missing where it is needed shows."""
    some, whole = both(llm)
    inputs = batch(model=some)
    wide = llm != "gemma2"  # its own eager attention gives NaN in float64
    for model in (some, whole):
        model.to(torch.float64 if wide else torch.float32)
    with positions(some) as seen:
        found = loss_and_gradients(some, inputs)
    labels = int((inputs["labels"] != -100).sum())
    assert seen == [labels] and some.last_layer.last == f"{labels} of {inputs['labels'].numel()} positions"
    assert_same(found, loss_and_gradients(whole, inputs), 1e-9 if wide else 1e-5)
    assert whole.last_layer.last == "in full: prune_last_layer='never'"
    inputs = batch(model=some, targets=None)
    with positions(some) as seen:
        first = some.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert seen == [3] * 6
    assert torch.equal(first, whole.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0))


@pytest.mark.parametrize("keep", [1, 2, 0, None])
def test_the_logits_kept_are_the_same_and_the_cache_is_whole(keep: int | None) -> None:
    some, whole = both("qwen3")
    inputs = batch(model=some, targets=None)
    with torch.no_grad():
        first, second = (model(**inputs, logits_to_keep=keep, use_cache=True) for model in (some, whole))
    assert some.last_layer.last.startswith("not asked" if not keep else f"{3 * keep} of")
    torch.testing.assert_close(first.logits, second.logits, rtol=1e-5, atol=1e-5)
    for one, other in zip(first.past_key_values.layers, second.past_key_values.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys)
        torch.testing.assert_close(one.values, other.values)


def test_labels_and_a_cache_together() -> None:
    some, whole = both()
    inputs = batch(model=some)
    outputs = [model(**inputs, use_cache=True) for model in (some, whole)]
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss)
    for one, other in zip(*(output.past_key_values.layers for output in outputs), strict=True):
        torch.testing.assert_close(one.keys, other.keys)


def test_a_batch_without_labels() -> None:
    some, _ = both()
    inputs = batch(model=some)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    found = loss_and_gradients(some, inputs)
    assert some.last_layer.last.startswith("0 of ") and all(not value.any() for value in found.values())


@pytest.mark.parametrize("llm", ["llama", "phi3", "gpt2"])
def test_lora_on_the_last_layer_gets_its_gradients(llm: str) -> None:
    targets = {"llama": ["q_proj", "o_proj", "down_proj", "v_proj"], "phi3": ["qkv_proj", "o_proj", "gate_up_proj"]}
    lora = dict(r=2, target_modules=targets.get(llm, ["c_attn", "c_proj", "c_fc"]), fan_in_fan_out=llm == "gpt2")
    models = both(llm, lora=lora)
    for model in models:
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        model.double()
    found = [loss_and_gradients(model, batch(model=model)) for model in models]
    assert any("lora" in name and ".2." in name for name in found[0])
    assert " of " in models[0].last_layer.last
    assert_same(*found, 1e-9)


def test_language_layers_need_not_end_with_the_last() -> None:
    some, whole = both(language_layers=[0, 1])
    inputs = batch(model=some)
    assert_same(loss_and_gradients(some, inputs), loss_and_gradients(whole, inputs), 1e-5)
    assert " of " in some.last_layer.last


def refusals() -> dict[str, tuple[str, Callable[[LayAlignForCausalLM], object], dict]]:
    """What is in the way -> (reason, how to put it there, arguments of the call)."""

    def nothing(model):
        pass

    def on_block(model):
        model.llm.model.layers[-1].mlp.register_forward_hook(lambda *_: None)

    def inside_block(model):
        model.llm.model.layers[-1].mlp.act_fn.register_forward_pre_hook(lambda *_: None)

    def on_layer(model):
        model.llm.model.layers[-1].register_forward_hook(lambda *_: None)

    def on_norm(model):
        model.llm.model.norm.register_forward_pre_hook(lambda *_: None)

    def on_the_gated_term(model):
        model.cross_attention[-1].register_forward_pre_hook(lambda *_: None)

    def on_model(model):
        model.llm.model.register_full_backward_hook(lambda *_: None)

    def checkpointed(model):
        model.train()
        model.gradient_checkpointing_enable(dict(use_reentrant=False))

    def drops_out(model):
        model.llm.model.layers[-1].mlp.up_proj = nn.Sequential(
            model.llm.model.layers[-1].mlp.up_proj, nn.Dropout(0.5)
        ).train()

    def other_linear(model):
        class OtherLinear(nn.Linear):
            pass

        model.llm.model.layers[-1].mlp.up_proj.__class__ = OtherLinear

    def pruned(model):
        model.llm.model.layers = model.llm.model.layers[:-1]

    def configured(model):
        model.llm.config.output_hidden_states = True

    return {
        "hidden states": ("outputs of all positions are asked for", nothing, dict(output_hidden_states=True)),
        "configured": ("outputs of all positions are asked for", configured, {}),
        "hook on the block": ("hooks observe the last layer", on_block, {}),
        "hook inside the block": ("hooks observe the last layer", inside_block, {}),
        "hook on the layer": ("hooks observe the last layer", on_layer, {}),
        "hook on the norm": ("hooks observe the last layer", on_norm, {}),
        "hook on the gated term": ("hooks observe the last layer", on_the_gated_term, {}),
        "hook on the model": ("hooks observe the last layer", on_model, {}),
        "checkpointed": ("the layer's activations are checkpointed", checkpointed, {}),
        "dropout": ("LlamaMLP is not made of linear maps and activations alone, or drops out", drops_out, {}),
        "other linear": ("LlamaMLP is not made of linear maps", other_linear, {}),
        "pruned": ("the LLM has no list of layers that ends with its last attention", pruned, {}),
    }


@pytest.mark.parametrize("name", refusals())
def test_it_is_whole_where_somebody_would_notice(name: str) -> None:
    reason, put, arguments = refusals()[name]
    model = tiny_model(language_layers=[0, 1])
    put(model)
    output = model(**batch(model=model), **arguments)
    assert model.last_layer.last.startswith(f"in full: {reason}")
    output.loss.backward()
    if arguments:
        expected = tiny_model(prune_last_layer="never", language_layers=[0, 1])(**batch(model=model), **arguments)
        for one, other in zip(output.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(one, other)


def test_hooks_of_engines_are_no_hindrance() -> None:
    model = tiny_model()

    def unshard(*_: object) -> None:
        pass

    unshard.__module__ = "torch.distributed.fsdp._fully_shard._fsdp_state"
    for module in (model.llm, model.llm.model.layers[-1], model.llm.model.layers[-1].mlp):
        module.register_forward_pre_hook(unshard)
    model(**batch(model=model))
    assert " of " in model.last_layer.last


@pytest.mark.slow
@compiles
def test_a_compiled_llm_is_left_alone() -> None:
    model = tiny_model()
    model.llm.model.layers[-1].compile(backend="eager")
    model(**batch(model=model))
    assert model.last_layer.last == "in full: a part of the LLM is compiled"


def test_nearly_all_positions() -> None:
    model = tiny_model()
    inputs = batch(sources=(1,), prompts=(0,), targets=(12,), model=model)
    wanted = model(**inputs).loss
    assert model.last_layer.last == "in full: nearly all positions are wanted"
    model.last_layer.choice = "always"
    torch.testing.assert_close(model(**inputs).loss, wanted)
    assert model.last_layer.last == "12 of 15 positions"


def test_always_says_what_is_in_the_way() -> None:
    model = tiny_model(prune_last_layer="always")
    inputs = batch(model=model)
    model(**inputs).loss.backward()
    assert " of " in model.last_layer.last
    with pytest.raises(ArgumentError, match="prune_last_layer: expected 'auto' or 'never' .*outputs of all positions"):
        model(**inputs, output_hidden_states=True)


def test_an_llm_whose_layers_are_not_a_list() -> None:
    llm = tiny_llm()
    llm.model.layers = nn.ModuleDict({str(i): layer for i, layer in enumerate(llm.model.layers)})
    found = LastLayer(llm)
    rows = Rows(torch.tensor([[True, False, False, False]]))
    assert "no list of layers" in str(found.reason_against(rows, {}))
    assert "no list of layers" in str(LastLayer(nn.Linear(2, 2)).reason_against(rows, {}))


def test_copies_look_at_their_own_modules() -> None:
    model = tiny_model()
    other = copy.deepcopy(model)
    assert other.last_layer._layer is other.llm.model.layers[-1]
    other(**batch(model=other))
    assert " of " in other.last_layer.last
    assert model.last_layer.last == "not asked yet"


def test_nothing_is_left_behind_and_other_threads_see_whole_modules() -> None:
    model = tiny_model()
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.llm.modules())  # noqa: E731
    before = hooks()
    model(**batch(model=model)).loss.backward()
    model.llm.lm_head.forward = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(**batch(model=model))
    assert hooks() == before
    linear, states, found = nn.Linear(4, 5), torch.randn(2, 3, 4), []
    with only_rows([linear], Rows(torch.eye(2, 3) > 0)):
        thread = threading.Thread(target=lambda: found.append(linear(states)))
        thread.start()
        thread.join()
        assert not torch.equal(linear(states), found[0])
    assert torch.equal(found[0], linear(states))


def test_rows_there_and_back() -> None:
    wanted = torch.tensor([[True, False, True], [False, False, True]])
    rows, states = Rows(wanted), torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert len(rows) == 3 and torch.equal(rows.select(states)[0], states[wanted])
    assert torch.equal(rows.spread(rows.select(states)), states * wanted[..., None])
    assert torch.autograd.gradcheck(lambda x: rows.spread(rows.select(x).square()), states)
    assert rows.of(states) and not rows.of(states[:, :2]) and not rows.of(states[0]) and not rows.of(None)
    last = Rows.last(torch.Size((2, 5)), 2, torch.device("cpu"))
    assert last.index.tolist() == [3, 4, 8, 9]
    with only_rows([linear := nn.Linear(4, 5).double()], rows, spread=False):
        assert torch.equal(linear(states), linear(states[wanted][None]))  # what is no whole batch goes through as it is


def test_what_counts_as_position_wise() -> None:
    assert position_wise(nn.Sequential(nn.Linear(2, 2), nn.SiLU(), nn.Dropout(0.5)).eval())
    assert position_wise(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)).train())
    for module in (nn.Conv1d(2, 2, 3), nn.Softmax(dim=1), nn.MultiheadAttention(4, 2), nn.BatchNorm1d(2), nn.Module()):
        assert not position_wise(nn.Sequential(nn.Linear(2, 2), module))


def test_the_setting_is_checked_and_saved(tmp_path) -> None:
    with pytest.raises(ArgumentError, match="prune_last_layer: expected"):
        LayAlignConfig(prune_last_layer="whole")
    tiny_model(prune_last_layer="never").save_pretrained(tmp_path, save_frozen=True)
    assert LayAlignForCausalLM.from_pretrained(tmp_path).last_layer.choice == "never"
