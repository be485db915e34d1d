"""No state of one call is visible in another: nested by a hook, in another thread, interleaved, interrupted."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from tiny import batch, tiny_model
from torch import Tensor, nn

from layalign import LayAlignForCausalLM

Model = LayAlignForCausalLM
SHAPES: dict[str, dict[str, Any]] = {
    "the same inputs": {},
    "others of the same shape": {"seed": 9},
    "another shape": {"sources": (4, 2), "prompts": (3, 1), "targets": (2, 2)},
}


def without_labels(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in inputs.items() if name != "labels"}


def logits(model: Model, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [model(**without_labels(inputs)).logits]


def last_logits(model: Model, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [model(**without_labels(inputs), logits_to_keep=1).logits]


def loss(model: Model, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [model(**inputs).loss, model(**inputs, skip_logits=True).loss]


def generated(model: Model, inputs: dict[str, Tensor]) -> list[Tensor]:
    found = model.generate(
        **without_labels(inputs), max_new_tokens=4, do_sample=False, eos_token_id=None, output_scores=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return [found.sequences, *found.scores]


def training(model: Model, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The loss and its gradients, which are none of the parameters' afterwards."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        found = model(**inputs).loss
    return [found.detach(), *torch.autograd.grad(found, trained)]


def bare(model: Model, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The LLM alone, with labels and for the last position."""
    ids = inputs["input_ids"]
    with torch.no_grad():
        return [model.llm(input_ids=ids, labels=ids).loss, model.llm(input_ids=ids, logits_to_keep=1).logits]


def lens(model: Model, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Parts of the LLM called by themselves, for states of the whole batch."""
    own = torch.Generator().manual_seed(0)  # the default one is shared between threads
    states, layer = torch.randn(*inputs["input_ids"].shape, 32, generator=own), model.llm.model.layers[-1]
    with torch.no_grad():
        return [
            model.llm.lm_head(model.llm.model.norm(states)),
            layer.mlp(states),
            layer.self_attn.q_proj(states),
            layer.self_attn.o_proj(states),
        ]


CALLS: dict[str, Callable[[Model, dict[str, Tensor]], list[Tensor]]] = {
    "logits": logits, "last logits": last_logits, "loss": loss, "generated": generated, "training": training,
    "bare": bare, "lens": lens,
}  # fmt: skip
PLACES: dict[str, Callable[[Model], nn.Module]] = {
    "first layer": lambda model: model.llm.model.layers[0],
    "inside a middle layer": lambda model: model.llm.model.layers[1].self_attn,
    "embeddings": lambda model: model.encoder.get_input_embeddings(),
    "body": lambda model: model.llm.model,
    "gate": lambda model: model.cross_attention[0],
}


def assert_same(found: list[Tensor], wanted: list[Tensor], what: str = "") -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=lambda text: f"{what}: {text}")


@contextmanager
def calling(module: nn.Module, call: Callable[[], Any], before: bool = False) -> Iterator[list[Any]]:
    """Within the block, ``module``'s first call from outside makes ``call``, once in each outer call."""
    results: list[Any] = []
    inside: list[bool] = []

    def hook(*_: Any) -> None:
        if not inside:
            inside.append(True)
            results.append(call())

    handle = module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
    try:
        yield results
    finally:
        handle.remove()


def hooks(model: nn.Module) -> int:
    """How much is put onto the modules' calls."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in m.__dict__) for m in model.modules())


@pytest.fixture(scope="module")
def wanted() -> Callable[[str, str], list[Tensor]]:
    """What a fresh model answers."""
    known: dict[tuple[str, str], list[Tensor]] = {}

    def answer(call: str, shape: str) -> list[Tensor]:
        if (call, shape) not in known:
            model = tiny_model(prune_last_layer="never")
            known[call, shape] = CALLS[call](model, batch(model=model, **SHAPES[shape]))
        return known[call, shape]

    return answer


OUTER = ("loss", "last logits", "training", "generated")
SAME = "others of the same shape"
NESTED = [
    *(("first layer", inner, SAME) for inner in CALLS),
    *((place, inner, SAME) for place in PLACES if place != "first layer" for inner in ("last logits", "lens")),
    *(("first layer", inner, shape) for inner in ("loss", "generated") for shape in SHAPES if shape != SAME),
]


@pytest.mark.parametrize(("place", "inner", "shape"), NESTED)
def test_a_call_inside_a_call(place: str, inner: str, shape: str, wanted: Any) -> None:
    model = tiny_model()
    inputs, others = batch(model=model), batch(model=model, **SHAPES[shape])
    before = hooks(model)
    for index, outer in enumerate(OUTER):
        with calling(PLACES[place](model), lambda: CALLS[inner](model, others), before=index % 2 == 0) as results:
            found = CALLS[outer](model, inputs)
        assert results, outer
        assert_same(results[0], wanted(inner, shape), f"{inner} in {outer}")
        assert_same(found, wanted(outer, "the same inputs"), f"{outer} around {inner}")
        assert hooks(model) == before
    CALLS["training"](model, inputs)
    assert model.last_layer.last.startswith("8 of ")  # and it is short again


@pytest.mark.parametrize("grad", [False, True])
def test_a_pass_inside_a_pass_over_the_same_source(grad: bool) -> None:
    model, inputs = tiny_model(), None
    inputs = without_labels(batch(model=model, targets=None))
    with torch.no_grad():
        first = model(**inputs, use_cache=True)
    step = torch.full((3, 1), 7)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)

    def decode(cache: Any) -> Tensor:
        return model(input_ids=step, attention_mask=mask, past_key_values=cache).logits

    def caches() -> list[Any]:
        return [copy.deepcopy(first.past_key_values) for _ in range(4)]

    outer, inner, *more = caches()
    for cache in (inner, *more):
        cache.source = outer.source  # one source for several sequences
    with torch.no_grad():
        expected = decode(more[0])
    with calling(model.llm.model.layers[1], lambda: decode(inner)) as results, torch.set_grad_enabled(grad):
        found = decode(outer)
    assert found.requires_grad == results[0].requires_grad == grad
    assert_same([found.detach(), results[0].detach()], [expected, expected])
    with calling(model.llm.model.layers[1], lambda: torch.no_grad()(decode)(more[1])) as results:
        found = decode(caches()[0])
    assert found.requires_grad and not results[0].requires_grad
    assert_same([found.detach(), results[0]], [expected, expected])


def test_threads_on_one_model_see_nothing_of_each_other(wanted: Any) -> None:
    model = tiny_model()
    before, problems = hooks(model), []

    def work(call: str, shape: str) -> None:
        try:
            inputs = batch(model=model, **SHAPES[shape])
            for _ in range(4):
                assert_same(CALLS[call](model, inputs), wanted(call, shape), call)
        except BaseException as error:
            problems.append((call, error))

    jobs = [
        (call, shape) for call in ("training", "loss", "last logits", "lens") for shape in (SAME, "the same inputs")
    ]
    for call, shape in jobs:
        wanted(call, shape)
    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems and hooks(model) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_any_module_leaves_nothing(error: type[BaseException], wanted: Any) -> None:
    model = tiny_model()
    inputs, before = batch(model=model), hooks(model)

    def fail(*_: Any) -> None:
        raise error

    named = [module for name, module in model.llm.named_modules() if name and next(module.children(), None) is None]
    raised = 0
    for module in named:
        handle = module.register_forward_pre_hook(fail)
        try:
            model(**inputs)
        except error:
            raised += 1
        handle.remove()
        assert hooks(model) == before
    assert raised > 20
    for call in ("loss", "last logits", "training"):
        assert_same(CALLS[call](model, inputs), wanted(call, "the same inputs"), call)


@pytest.mark.slow
def test_an_interrupt_at_any_line_leaves_the_next_call_right(wanted: Any) -> None:
    model = tiny_model()
    inputs = batch(model=model)
    left = [0]

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        inside = ("nn/rows.py", "last_layer.py", "modeling/cross_attention.py", "liger.py", "llm_pass.py")
        if not frame.f_code.co_filename.endswith(inside):
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        return trace

    def interrupted(at: int) -> bool:
        left[0] = at
        sys.settrace(trace)
        try:
            model(**inputs, skip_logits=True)
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False

    model(**inputs)
    at = 1
    while interrupted(at):
        found = CALLS["loss"](model, inputs)
        assert_same(found, wanted("loss", "the same inputs"), f"after the {at}th line")
        assert model.last_layer.last.startswith("8 of ")
        at += 17
    assert at > 100


@pytest.mark.parametrize("checkpoints", [None, False, True], ids=["plain", "checkpoints", "reentrant"])
def test_a_backward_after_other_calls(checkpoints: bool | None, wanted: Any) -> None:
    model = tiny_model()
    if checkpoints is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpoints})
        model.llm.train()
    inputs, others = batch(model=model), batch(model=model, **SHAPES[SAME])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def backward(loss: Tensor) -> list[Tensor]:
        for parameter in trained:
            parameter.grad = None
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in trained if parameter.grad is not None)]

    first = model(**inputs).loss
    second = model(**others).loss
    CALLS["loss"](model, others), CALLS["bare"](model, others)
    assert_same(backward(first), wanted("training", "the same inputs"))
    assert_same(backward(second), wanted("training", SAME))
    loss = model(**inputs).loss
    handle = loss.register_hook(lambda _: results.append(CALLS["loss"](model, others)))
    results: list[Any] = []
    assert_same(backward(loss), wanted("training", "the same inputs"))
    handle.remove()
    assert_same(results[0], wanted("loss", SAME))


def test_generations_by_turns_are_those_one_after_the_other() -> None:
    model = tiny_model()
    both = [without_labels(batch(model=model, targets=None, seed=seed)) for seed in (3, 9)]

    def steps(inputs: dict[str, Tensor]) -> Iterator[Tensor]:
        mask = inputs["attention_mask"]
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        for _ in range(5):
            yield output.logits
            mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], dim=1)
            token = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=token, attention_mask=mask, past_key_values=output.past_key_values)

    with torch.no_grad():
        alone = [list(steps(inputs)) for inputs in both]
        turns = list(zip(*(steps(inputs) for inputs in (*both, both[0])), strict=True))
    for index, wanted in enumerate((*alone, alone[0])):
        assert_same([step[index] for step in turns], wanted)


def test_hooks_that_come_and_go_within_a_pass(wanted: Any) -> None:
    model = tiny_model()
    inputs, before, seen = batch(model=model), hooks(model), []
    handles: list[Any] = []

    def come(*_: Any) -> None:
        for name, module in model.llm.named_modules():
            if name.endswith(("mlp", "lm_head", "q_proj")):
                handles.append(module.register_forward_hook(lambda *_: seen.append(1)))

    def go(*_: Any) -> None:
        while handles:
            handles.pop().remove()

    first, last = model.llm.model.layers[0], model.llm.model.layers[1]
    own = [first.register_forward_pre_hook(come), last.register_forward_hook(go)]
    for call in ("loss", "training", "last logits"):
        assert_same(CALLS[call](model, inputs), wanted(call, "the same inputs"), call)
    for handle in own:
        handle.remove()
    assert seen and hooks(model) == before


def test_a_copy_made_within_a_pass_is_whole(wanted: Any) -> None:
    model = tiny_model()
    inputs = batch(model=model)
    with calling(model.llm.model.layers[0], lambda: copy.deepcopy(model), before=True) as copies:
        CALLS["training"](model, inputs)
    for call in ("loss", "training", "bare", "lens"):
        assert_same(CALLS[call](copies[0], inputs), wanted(call, "the same inputs"), call)


def test_an_llm_whose_layers_are_in_no_list_has_the_same_loss() -> None:
    """Nobody knows where its last hidden state leaves, so all logits are made."""
    model = tiny_model()
    inputs = batch(model=model)
    expected = CALLS["training"](model, inputs)
    model.last_layer.bodies = []
    assert_same(CALLS["training"](model, inputs), expected)
