"""torch.compile: the whole training forward and a first pass in one graph each, no new graph for new shapes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import batch, open_gates, tiny_encoder, tiny_llm
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

from layalign import LayAlignForCausalLM
from layalign.modeling.cache import SourceDynamicCache, get_source, source_cache
from layalign.ops.backends import cpp

DEPTH = {"m2m_100": "encoder_layers", "mt5": "num_layers", "xlm-roberta": "num_hidden_layers"}
# The first two differ in every size, so that the second compilation knows what varies.
SHAPES = [
    ((6, 3, 5), (2, 4, 0), (3, 1, 4)),
    ((4, 7), (3, 1), (2, 5)),
    ((9, 2, 5, 8), (1, 2, 3, 4), (3, 4, 1, 2)),
    ((5, 11, 3), (6, 2, 0), (4, 4, 4)),
    ((12,) * 5, (2,) * 5, (3,) * 5),
    ((40, 30), (9, 9), (9, 9)),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def small(encoder: str = "mt5", llm: str = "llama", **config: Any) -> LayAlignForCausalLM:
    """Two encoder layers and one LLM layer: graphs are built in seconds."""
    parts = tiny_encoder(encoder, **{DEPTH[encoder]: 2}), tiny_llm(llm, num_hidden_layers=1)
    torch.manual_seed(2)
    model = LayAlignForCausalLM.from_encoder_and_llm(*parts, **config)
    open_gates(model)
    return model.eval()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def trained(model: LayAlignForCausalLM) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def loss_and_gradients(model: LayAlignForCausalLM, call: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = call(**inputs).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in trained(model).items()}}


def check_training(model: LayAlignForCausalLM, backend: str, shapes: list[Any]) -> None:
    """Every shape gives the eager loss and gradients; only the first two build a graph. Eager calls come in between."""
    step = torch.compile(model, fullgraph=True, backend=backend)
    moved = set()
    for index, shape in enumerate(shapes):
        inputs = batch(*shape, model=model, seed=index)
        with torch._dynamo.config.patch(error_on_recompile=index > 1):
            found = loss_and_gradients(model, step, inputs)
        expected = loss_and_gradients(model, model, inputs)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            scale = tensor.abs().max().clamp(min=1e-2)
            assert (found[name] - tensor).abs().max() <= 1e-5 * scale, (name, shape)
        moved |= {name for name, tensor in expected.items() if tensor.abs().max() > 0}
    assert moved == set(expected)
    assert graphs() == min(2, len(shapes)) and not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "llm"),
    [("m2m_100", "mistral"), ("xlm-roberta", "llama_gqa_wide_heads"), ("mt5", "qwen3"), ("xlm-roberta", "qwen2")],
)
def test_the_training_forward_is_one_graph_for_all_shapes(encoder: str, llm: str) -> None:
    check_training(small(encoder, llm), "eager", SHAPES)


@pytest.mark.slow
def test_the_backward_is_compiled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """These shapes lie on both sides of what chooses kernels in eager calls: the size of the mix, the text length."""
    monkeypatch.setattr(cpp, "MIN_TRAINED", 24 * 2 * 20)
    model = small()
    inputs = [batch(*shape, model=model) for shape in SHAPES]
    assert {len(i["encoder_input_ids"].flatten()) >= 20 for i in inputs} == {True, False}
    assert {i["input_ids"].shape[1] <= 16 for i in inputs} == {True, False}
    check_training(model, "aot_eager", SHAPES)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler")
def test_inductor_trains_with_the_same_numbers() -> None:
    model = small(impl="torch")  # inductor then compiles the mathematics themselves, not calls of kernels
    check_training(model, "inductor", SHAPES[:1])


@pytest.mark.slow
def test_compiled_under_autocast() -> None:
    model = small("xlm-roberta")
    inputs = batch(model=model)
    step = torch.compile(model, fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (loss_and_gradients(model, call, inputs) for call in (step, model))
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - tensor).abs().max() <= 0.03 * tensor.abs().max().clamp(min=1e-3), name
    assert graphs() == 1


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("cache", [None, "static", "dynamic"])
def test_a_first_pass_compiles_and_its_cache_carries_the_source(cache: str | None) -> None:
    model = small("m2m_100")
    inputs = batch(model=model, targets=None)
    step = torch.compile(model, fullgraph=True, backend="eager")
    made = {"static": lambda: StaticCache(config=model.llm.config, max_cache_len=24)}
    made["dynamic"] = lambda: DynamicCache(config=model.llm.config)
    keep = {} if cache is None else {"past_key_values": source_cache(made[cache]()), "use_cache": True}
    output, expected = step(**inputs, **keep), model(**inputs, use_cache=True)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-5, atol=1e-5)
    cache_out = output.past_key_values
    assert keep.get("past_key_values", cache_out) is cache_out
    assert isinstance(cache_out, StaticCache if cache == "static" else SourceDynamicCache)
    real = inputs["encoder_attention_mask"].bool()[:, None, :, None]  # eager calls leave padding out
    keys, expected_keys = get_source(cache_out).keys[0], get_source(expected.past_key_values).keys[0]
    torch.testing.assert_close(keys * real, expected_keys)
    ids, mask = torch.tensor([[7], [8], [9]]), torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    again = dict(input_ids=ids, attention_mask=mask)
    found = model(**again, past_key_values=cache_out).logits
    torch.testing.assert_close(found, model(**again, past_key_values=expected.past_key_values).logits)
    if cache != "static":  # and beam search still reorders the source with the rest
        cache_out.reorder_cache(torch.tensor([2, 0, 1]))
        torch.testing.assert_close(get_source(cache_out).keys[0], keys[[2, 0, 1]])


@pytest.mark.slow
@torch.no_grad()
def test_compiled_from_the_first_pass_on_a_static_cache() -> None:
    """One graph for first passes, one for steps; a second batch needs none."""
    model = small()
    step = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    cache = source_cache(StaticCache(config=model.llm.config, max_cache_len=24))
    cache.early_initialization(3, 4, 8, torch.float32, torch.device("cpu"))
    for seed in range(3):
        cache.reset()
        inputs = batch(model=model, targets=None, seed=seed)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 24 - inputs["attention_mask"].shape[1]))
        step(**inputs, past_key_values=cache, use_cache=True)
        expected = model(**inputs, use_cache=True).past_key_values
        for index in range(2):
            place = inputs["attention_mask"].shape[1] + index
            mask[:, place] = 1
            ids = torch.full((3, 1), 5 + index)
            positions = mask.sum(1, keepdim=True) - 1
            found = step(ids, mask, position_ids=positions, past_key_values=cache, use_cache=True).logits
            eager = model(ids, mask[:, : place + 1], past_key_values=expected).logits
            torch.testing.assert_close(found, eager, rtol=1e-5, atol=1e-5)
        assert graphs() == 2
    assert not counters["graph_break"]


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_first_pass_over_a_plain_cache_says_what_to_do() -> None:
    model = small()
    inputs = batch(model=model, targets=None)
    plain = dict(past_key_values=DynamicCache(config=model.llm.config), use_cache=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"past_key_values: expected a cache from .*source_cache"):
        torch.compile(model, fullgraph=True, backend="eager")(**inputs, **plain)
    torch._dynamo.reset()
    output = torch.compile(model, backend="eager")(**inputs, **plain)  # with a break in the graph it goes on
    torch.testing.assert_close(output.logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)
    assert get_source(output.past_key_values) is not None


def test_layers_compiled_one_by_one_train_without_compiling_again() -> None:
    """What a pass keeps for eager calls is new in every step: no graph may look at it."""
    model = small().train()
    inputs = batch(model=model)

    def step() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)  # the encoder drops out
        return loss_and_gradients(model, model, inputs)

    eager = [step() for _ in range(3)][-1]  # the third takes what the second kept
    for layer in model.llm.model.layers:
        layer.compile(backend="eager")
    for _ in range(4):
        found = step()
    assert graphs() == 1 and not counters["graph_break"]
    for name, value in eager.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
