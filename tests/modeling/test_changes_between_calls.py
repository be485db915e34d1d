"""Whatever changes between two calls, the next answer is that of a model built afresh from the same values.

Changes and calls are drawn in any order (``drawn_changes.py`` has the changes). After every change the model answers,
and so does one that has never been called, with copies of the same tensors: equal numbers, or the same kind of error.

``LAYALIGN_DRAWN=5000`` draws so many sequences for each test, other ones every time; without it the same few are drawn.
"""

from __future__ import annotations

import copy
import functools
import os
import pickle
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from drawn_changes import CHANGES, MEMORY, OBJECTS, STRUCTURE, WORLD, Case, never_called, other, same_world_afterwards
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from published_tiny import data, published, published_model, wrappers
from tiny import VOCABULARY, batch, compiles, tiny_model
from torch import Tensor, nn
from transformers import DynamicCache

import layalign
from layalign import ArgumentError, LayAlignForCausalLM
from layalign.modeling import attention_interface
from layalign.modeling.cache import SourceKeyValues, get_source, set_source
from layalign.nn.inspection import device_of
from layalign.ops.cached_launch import CachedDecode
from layalign.serving.http.decoding import Decoder, Inputs, State, kept, merged
from layalign.utils.versions import cache_of

DRAWN = int(os.environ.get("LAYALIGN_DRAWN", "0"))
Answer = dict[str, Tensor]
Modes = tuple[Any, Any]  # a grad mode, and the dtype of autocast or None

BATCHES = [
    dict(sources=(6, 3, 5), prompts=(2, 4, 0), targets=(3, 1, 4)),
    dict(sources=(4,), prompts=(3,), targets=(2,)),
    dict(sources=(12, 2, 1), prompts=(1, 1, 1), targets=(2, 2, 2)),
    dict(sources=(5, 5), prompts=(3, 3), targets=(2, 2)),
]
FLOAT_BOUND = 2e-5  # of the largest number: sums of up to 64 products in another order, through three layers
HALF_BOUND = 5e-2  # two products rounded to bfloat16 instead of one
TAKEN: Counter[str] = Counter()  # paths of the models under change
DONE: Counter[str] = Counter()


def drawn(few: int) -> Callable[[Any], Any]:
    """So many sequences, always the same; as many other ones as are asked for."""
    health = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    phases = [Phase.explicit, Phase.generate, *([Phase.shrink] if DRAWN else [])]  # shrinking takes minutes
    common = dict(deadline=None, database=None, suppress_health_check=health, print_blob=True, phases=phases)
    if DRAWN:
        return settings(max_examples=DRAWN, **common)
    return settings(max_examples=few, derandomize=True, **common)


# Answers


@contextmanager
def under(modes: Modes, device: str = "cpu") -> Iterator[None]:
    mode, dtype = modes
    with mode(), torch.autocast(device, dtype) if dtype is not None else nullcontext():
        yield


def inputs(model: Any, which: int) -> dict[str, Tensor]:
    device = device_of(model.get_input_embeddings())  # also where accelerate keeps weights elsewhere
    return {name: tensor.to(device) for name, tensor in batch(model=model, seed=which, **BATCHES[which % 4]).items()}


def logits(model: Any, which: int, keep: int | None = None) -> Answer:
    given = inputs(model, which)
    del given["labels"]
    found = model(**given, logits_to_keep=keep).logits
    return {"logits": found[:, -1] if keep else found[given["attention_mask"].bool()]}


def training(model: Any, which: int) -> Answer:
    """The loss, and every gradient where gradients are recorded."""
    model.zero_grad()
    loss = model(**inputs(model, which)).loss
    if torch.is_grad_enabled():
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": loss, **found}


def generated(model: Any, which: int) -> Answer:
    given = inputs(model, which)
    del given["labels"]
    how = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    found = model.generate(**given, **how, output_logits=True, return_dict_in_generate=True)
    return {"logits": torch.stack(found.logits), "ids": found.sequences}


def in_threads(model: Any, which: int) -> Answer:
    if model.training:  # dropout draws from the process's one generator, in the order in which the threads come
        return logits(model, which)
    found: list[Any] = [None, None]
    begin = threading.Barrier(2)

    def call(place: int) -> None:
        with torch.no_grad():
            begin.wait()
            found[place] = answered(lambda: logits(model, which + place, keep=place or None))

    threads = [threading.Thread(target=call, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {f"{name}{place}": value for place, each in enumerate(found) for name, value in raised(each).items()}


ANSWERS: dict[str, Callable[[Any, int], Answer]] = {
    "logits": logits,
    "last logits": lambda model, which: logits(model, which, keep=1),
    "training": training,
    "generated": generated,
    "threads": in_threads,
}


def places(model: Any, draw: random.Random) -> nn.Module:
    """A module that runs in a call, often inside the LLM."""
    return draw.choice([*(module for module in model.modules()), *model.llm.modules(), *model.llm.modules()])


def nested(model: Any, which: int) -> Answer:
    """A call inside a call: a hook on some module asks for another answer."""
    draw, inner = random.Random(which), Answer()
    place, name = places(model, draw), draw.choice(["logits", "last logits", "generated"])
    other_one = which + draw.choice([1, 4, 4])  # of another shape, or of the same

    def ask(*_: Any) -> None:
        handle.remove()
        inner.update(ANSWERS[name](model, other_one))

    handle = draw.choice([place.register_forward_hook, place.register_forward_pre_hook])(ask)
    try:
        outer = ANSWERS[draw.choice(["last logits", "training", "generated"])](model, which)
    finally:
        handle.remove()
    TAKEN["nested"] += len(inner) > 0
    return {**outer, **{f"inner {name}": value for name, value in inner.items()}}


def not_nested(model: Any, which: int) -> Answer:
    draw = random.Random(which)
    _, name = places(model, draw), draw.choice(["logits", "last logits", "generated"])
    other_one, _ = which + draw.choice([1, 4, 4]), draw.choice([0, 1])
    outer = ANSWERS[draw.choice(["last logits", "training", "generated"])](model, which)
    return {**outer, **{f"inner {n}": value for n, value in ANSWERS[name](model, other_one).items()}}


class Interrupt(BaseException):
    """Ctrl-C at any place."""


def interrupted(model: Any, which: int) -> Answer:
    """The answer that follows a call which ended in its middle."""
    draw = random.Random(which)
    place, left = places(model, draw), [draw.choice([0, 0, 1])]

    def stop(*_: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            TAKEN["interrupted"] += 1
            raise Interrupt

    handle = place.register_forward_pre_hook(stop)
    try:
        ANSWERS[draw.choice(["last logits", "training", "generated"])](model, which)
    except Interrupt:
        pass
    finally:
        handle.remove()
    return ANSWERS[draw.choice(["last logits", "training", "generated"])](model, which + 1)


def not_interrupted(model: Any, which: int) -> Answer:
    draw = random.Random(which)
    places(model, draw), draw.choice([0, 0, 1]), draw.choice([0, 1, 2])
    return ANSWERS[draw.choice(["last logits", "training", "generated"])](model, which + 1)


ASKED = ANSWERS | {"nested": nested, "interrupted": interrupted}
SIMPLY = {"nested": not_nested, "interrupted": not_interrupted}  # what a fresh model is asked instead


def answered(call: Callable[[], Answer]) -> Answer | Exception:
    """What a call returns or raises."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed asks every kind of device
    try:
        return {name: value.detach().clone() for name, value in call().items()}
    except Exception as error:
        return error


def raised(found: Answer | Exception) -> Answer:
    if isinstance(found, Exception):
        raise found
    return found


def bound_of(model: nn.Module, modes: Modes) -> float:
    half = modes[1] is not None or any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    return HALF_BOUND if half else FLOAT_BOUND


def assert_same(found: Answer | Exception, expected: Answer | Exception, bound: float) -> None:
    TAKEN["compared"] += 1
    if isinstance(found, dict) and isinstance(expected, dict):  # the place of a nested call may not be reached
        expected = {name: value for name, value in expected.items() if name in found or "inner" not in name}
    if isinstance(found, Exception) or isinstance(expected, Exception):
        TAKEN["errors"] += 1
        if type(found) is not type(expected):
            raise AssertionError(f"{found!r}, expected {expected!r}") from (
                found if isinstance(found, Exception) else expected
            )
        return
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        got = found[name]
        assert got.shape == wanted.shape and got.dtype == wanted.dtype, name
        # Gradients are sums in which most cancels.
        limit = (10 * bound if "." in name else bound) * wanted.double().abs().nan_to_num(0).max().clamp(min=1e-2)
        error = (got.double() - wanted.double()).abs().nan_to_num(0).max()
        assert torch.equal(got.isnan(), wanted.isnan()) and error <= limit, f"{name}: off by {error:.1e}, {limit:.1e}"


@pytest.fixture(autouse=True, scope="module")
def _taken() -> Iterator[None]:
    """Count which of the quick paths answer."""
    own = CachedDecode.__call__

    def counting(*args: Any) -> Any:
        found = own(*args)
        TAKEN["CachedDecode"] += found is not None
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CachedDecode, "__call__", counting)
        yield
    if DRAWN:
        print("\n", dict(TAKEN), dict(DONE))


# The library's model


LLMS = ["llama", "llama", "llama_gqa_wide_heads", "qwen2", "phi3"]


@functools.cache
def template(llm: str, shape: tuple[str, str], fold_projections: str, encoder: str, impl: str) -> LayAlignForCausalLM:
    layers = [0, 2] if encoder == "bert" else None
    settings = dict(structure=shape[0], mix=shape[1], fold_projections=fold_projections, language_layers=layers)
    model = tiny_model(encoder, llm, **settings)
    model.encoder_aligner.projector.impl = impl
    return model


def built(**arguments: Any) -> LayAlignForCausalLM:
    return copy.deepcopy(template(**arguments))


MODELS = st.builds(
    functools.partial,
    st.just(built),
    llm=st.sampled_from(LLMS),
    shape=st.sampled_from([("Linear", "layer-wise")] * 4 + [("MLP", "layer-wise"), ("Linear", "shared")]),
    fold_projections=st.sampled_from(["auto", "always", "always", "never"]),
    encoder=st.sampled_from(["mt5", "bert"]),
    impl=st.sampled_from(["auto", "auto", "torch"]),  # torch: folded weights as they are, as on a GPU
)


SEEDS = st.integers(0, 2**16)
MODES = st.tuples(
    st.sampled_from([torch.enable_grad, torch.no_grad, torch.no_grad, torch.inference_mode]),
    st.sampled_from([None, None, None, torch.bfloat16]),
)


def a_change(*tables: dict[str, Any]) -> st.SearchStrategy[tuple[str, str, int]]:
    return st.tuples(st.just("change"), st.one_of(*(st.sampled_from(sorted(table)) for table in tables)), SEEDS)


AN_ANSWER = st.tuples(st.just("answer"), st.sampled_from(sorted(ASKED)), SEEDS, MODES)


def cache_for(model: Any, cache: Any) -> DynamicCache:
    """A copy of a cache for another model, in memory of its own, with nothing kept from calls."""
    found, own = DynamicCache(), get_source(cache)
    for layer, each in enumerate(cache.layers):
        found.update(each.keys.clone(), each.values.clone(), layer)
    assert own is not None
    copies = own.map(torch.clone)
    return set_source(found, SourceKeyValues(own.layers, copies.keys, copies.values, copies.mask, real=copies.real))


class Going:
    """A generation under way: what a cache and a mask hold."""

    def __init__(self, model: Any, which: int, modes: Modes) -> None:
        given = inputs(model, which)
        del given["labels"]
        with under(modes):
            self.cache = cache_of(model(**given, past_key_values=DynamicCache(), use_cache=True))
        self.mask, own = given["attention_mask"], get_source(self.cache)
        set_source(self.cache, own.map(MEMORY.take))

    def copy_for(self, model: Any) -> Going:
        """The same for another model, in memory of its own, with nothing kept from calls."""
        found = object.__new__(Going)
        found.mask, found.cache = self.mask.clone(), cache_for(model, self.cache)
        return found

    def step(self, model: Any, which: int) -> Answer:
        rows = len(self.mask)
        ids = torch.randint(4, VOCABULARY, (rows, 1), generator=torch.Generator().manual_seed(which))
        mask = torch.cat([self.mask, self.mask.new_ones(rows, 1)], dim=1)
        output = model(input_ids=ids.to(mask.device), attention_mask=mask, past_key_values=self.cache, use_cache=True)
        self.mask = mask
        return {"logits": output.logits[:, -1]}


def source_changed(going: Going, which: int) -> None:
    """Other memory, other values or other rows for the source that a cache carries."""
    draw, own = random.Random(which), get_source(going.cache)
    assert own is not None
    held = any(layer.keys.requires_grad for layer in going.cache.layers)  # by the graphs of its steps
    how = draw.choice(["data", "set_", "swap", "in place", "rows", "repeat", "cast", "clone", "strides"])
    if how == "rows":
        index = torch.tensor([draw.randrange(len(going.mask)) for _ in going.mask])
        going.cache.batch_select_indices(index)
        going.mask = going.mask[index]
        return
    if how == "repeat" and len(going.mask) < 4:
        going.cache.batch_repeat_interleave(2)
        going.mask = going.mask.repeat_interleave(2, dim=0)
        return
    chosen = [tensor for tensor in (*own.keys, *own.values) if draw.random() < 0.6]
    if own.mask is not None and draw.random() < 0.4:
        chosen.append(own.mask)
    with torch.inference_mode(any(tensor.is_inference() for tensor in chosen)), torch.no_grad():
        for tensor in chosen:
            new = tensor.roll(1, 0).clone() if tensor.dtype == torch.bool else other(tensor, draw)
            if how == "strides" and tensor.dim() == 4:
                new = new.transpose(1, 2).contiguous().transpose(1, 2)
            if how != "strides":
                tensor.data = torch.empty(0) if how in ("data", "cast") else tensor.data
                new = MEMORY.take(new)
            if how == "in place":
                tensor.copy_(new)
            elif how == "set_":
                tensor.set_(new)
            elif how == "swap" and not held:
                torch.utils.swap_tensors(tensor, new)
            else:
                tensor.data = new
            del new
    if how == "clone":
        set_source(going.cache, own.map(torch.clone))


def asked(
    case: Case, call: Callable[[Any], Answer], modes: Modes = (torch.no_grad, None), simply: Any = None
) -> Answer | Exception:
    """The model's answer, compared with that of one built afresh; ``simply``: how that one is asked."""
    model = case.fresh()
    with never_called(), under(modes):
        expected = answered(lambda: (simply or call)(model))
    with under(modes):
        found = answered(lambda: call(case.model))
    if not is_refused_by_torch(case.model, found):
        assert_same(found, expected, bound_of(case.model, modes))
    return found


def is_refused_by_torch(model: Any, found: Answer | Exception) -> bool:
    """Weights made in inference mode, which copies are not: no gradient passes, and with other data nothing does."""
    if not isinstance(found, RuntimeError) or "Inference tensors" not in str(found):
        return False
    for parameter in model.parameters():
        try:
            _ = parameter._version
        except RuntimeError:
            return True
    return False


def compared(case: Case, name: str, which: int, modes: Modes) -> None:
    simply = functools.partial(SIMPLY.get(name, ASKED[name]), which=which)
    asked(case, functools.partial(ASKED[name], which=which), modes, simply)
    TAKEN[case.model.key_values.last.partition(":")[0]] += 1
    TAKEN["last layer in part"] += "positions" in case.model.last_layer.last


def stepped(case: Case, going: Going, which: int, modes: Modes, steps: int) -> None:
    """Some steps of a generation under way, each compared; a copy of its cache serves the fresh model."""
    model = case.fresh()
    with under(modes):
        own = going.copy_for(model)
        for step in range(steps):
            with never_called():
                expected = answered(lambda step=step: own.step(model, which + step))
            found = answered(lambda step=step: going.step(case.model, which + step))
            if not is_refused_by_torch(case.model, found):
                assert_same(found, expected, bound_of(case.model, modes))
            if isinstance(found, Exception):
                break


@drawn(12)
@given(
    MODELS,
    st.lists(st.one_of(a_change(CHANGES, CHANGES, STRUCTURE, OBJECTS, WORLD), AN_ANSWER), min_size=2, max_size=8),
    st.sampled_from(sorted(ANSWERS)),
    MODES,
)
def calls_and_changes(build: Any, steps: list[Any], first: str, modes: Modes) -> None:
    with same_world_afterwards():
        case = Case(build)
        with under(modes):
            answered(lambda: ANSWERS[first](case.model, 0))
        last = first, 0, modes
        for kind, name, number, *rest in steps:
            if kind == "change":
                note(f"{name}({number})")
                DONE[name] += 1
                case.change(name, number)
            else:
                last = name, number, rest[0]
            answer, which, how = last
            note(f"  {answer}({which}) under {how}")
            compared(case, answer, which, how)


@drawn(12)
@given(
    MODELS,
    SEEDS,
    st.lists(
        st.tuples(
            st.one_of(
                a_change(CHANGES, STRUCTURE, WORLD), st.tuples(st.just("source"), st.just("source"), SEEDS), st.none()
            ),
            st.integers(1, 3),
            MODES,
        ),
        min_size=2,
        max_size=6,
    ),
    MODES,
)
def a_generation(build: Any, which: int, steps: list[Any], modes: Modes) -> None:
    with same_world_afterwards():
        case = Case(build)
        going = Going(case.model, which, modes)
        stepped(case, going, which, modes, 2)
        for change, count, how in steps:
            if change is not None and change[0] == "change":
                note(f"{change[1]}({change[2]})")
                DONE[change[1]] += 1
                case.change(*change[1:])
            elif change is not None:
                note(f"source({change[2]})")
                DONE["source"] += 1
                source_changed(going, change[2])
            note(f"  {count} steps under {how}")
            stepped(case, going, which, how, count)


# The served model


def requests(draw: random.Random) -> list[Inputs]:
    """One or two sequences."""
    found = []
    for _ in range(draw.choice([1, 1, 2])):
        source, prompt = ([draw.randrange(4, VOCABULARY) for _ in range(draw.randrange(1, 8))] for _ in range(2))
        found.append(Inputs(tuple(source), (1, *([0] * (len(source) + 1)), *prompt)))
    return found


class Server:
    """A model that decodes a batch which changes."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.state: Any = None

    def join(self, draw: random.Random) -> None:
        rows, found = requests(draw), []

        def prefill(model: Any) -> Answer:
            found.append(Decoder(model, 0).prefill(rows))
            return {"logits": found[-1][1]}

        asked(self.case, prefill)
        if len(found) == 2:  # both, the one under change last
            try:
                self.state = found[-1][0] if self.state is None else merged(self.state, found[-1][0])
            except RuntimeError:  # another dtype than the rows before
                self.state = found[-1][0]
            TAKEN["joined"] += 1

    def leave(self, draw: random.Random) -> None:
        if self.state is not None and len(self.state.lengths) > 1:
            self.state = kept(self.state, draw.sample(range(len(self.state.lengths)), len(self.state.lengths) - 1))

    def step(self, model: Any, token: int) -> Answer:
        """The fresh model is asked first, with a copy."""
        state = self.state
        if model is not self.case.model:
            state = State(list(state.lengths), list(state.sources), cache_for(model, state.cache))
        return {"logits": Decoder(model, 0).step(state, [4 + (token + row) % 60 for row in range(len(state.lengths))])}

    def steps(self, token: int) -> None:
        for _ in range(2):
            if self.state is not None:
                found = asked(self.case, functools.partial(self.step, token=token))
                self.state = None if isinstance(found, Exception) else self.state


@drawn(6)
@given(
    MODELS,
    st.lists(
        st.one_of(
            st.tuples(st.just("join"), st.just("join"), SEEDS),
            st.tuples(st.just("leave"), st.just("leave"), SEEDS),
            a_change(CHANGES, STRUCTURE, WORLD),
        ),
        min_size=3,
        max_size=8,
    ),
)
def served(build: Any, steps: list[Any]) -> None:
    with same_world_afterwards():
        server = Server(Case(build))
        for kind, name, number in [("join", "join", 1), *steps]:
            note(f"{name}({number})")
            DONE[name] += 1
            if kind == "change":
                server.case.change(name, number)
            else:
                getattr(server, kind)(random.Random(number))
            server.steps(number)


# The one-line swap


@functools.cache
def published_template(llm: str, structure: str) -> Any:
    return published_model(llm, structure, layers=(0, 2) if llm == "qwen2" else (0, 1, 2))


def published_built(**arguments: str) -> Any:
    return copy.deepcopy(published_template(**arguments))


def bring_states(fresh: Any, model: Any) -> None:
    """The source that the wrapped layers hold."""
    for one, two in zip(wrappers(fresh), wrappers(model), strict=True):
        pair = two.adapter_states
        one.adapter_states = pair.clone() if isinstance(pair, Tensor) else tuple(t.detach().clone() for t in pair)


def published_loss(model: Any, which: int) -> Answer:
    model.zero_grad()
    loss = model(**data(which))
    if torch.is_grad_enabled():
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": loss, **found}


def published_logits(model: Any, which: int) -> Answer:
    given = data(which)
    embeds, mask = model._source(given["input_ids_mt"], given["attention_mask_mt"])
    embeds, mask, _ = published.squeeze_padding(embeds, mask)
    return {"logits": model.model_llm(inputs_embeds=embeds, attention_mask=mask).logits[:, -1]}


def published_steps(model: Any, which: int) -> Answer:
    """With the source that is there already."""
    dtype = model.llm_embedding_layer.weight.dtype
    embeds = torch.randn(3, 3, 2, 32, generator=torch.Generator().manual_seed(which)).to(dtype)
    return {"logits": torch.stack([model.model_llm(inputs_embeds=each).logits for each in embeds])}


COPIES = {"deep_copied": OBJECTS["deep_copied"]}  # transformers' recorders keep the published model from pickles
PUBLISHED = {
    "loss": published_loss,
    "logits": published_logits,
    "steps": published_steps,
    "more steps": published_steps,
}


@drawn(10)
@given(
    st.builds(
        functools.partial, st.just(published_built), llm=st.sampled_from(["llama", "llama_gqa_wide_heads", "qwen2"]),
        structure=st.sampled_from(["Linear", "Linear", "MLP"]),
    ),
    st.lists(
        st.tuples(
            st.one_of(a_change(CHANGES, STRUCTURE, COPIES), st.none()), st.sampled_from(sorted(PUBLISHED)), SEEDS, MODES
        ),
        min_size=2,
        max_size=6,
    ),
)  # fmt: skip
def a_swapped_model(build: Any, steps: list[Any]) -> None:
    with same_world_afterwards():
        case = Case(build, layalign.swap_modules, bring_states)
        answered(lambda: published_logits(case.model, 0))
        for change, name, which, modes in steps:
            if change is not None:
                note(f"{change[1]}({change[2]})")
                DONE[change[1]] += 1
                case.change(*change[1:])
            note(f"  {name}({which}) under {modes}")
            asked(case, functools.partial(PUBLISHED[name], which=which), modes)
            TAKEN["swapped"] += 1


# Compiled


IN_PLACE = [
    name for name in CHANGES if name not in ("another_dtype", "another_device", "offloaded", "asked_for_gradients")
]


@drawn(1)
@given(st.lists(st.tuples(st.sampled_from(sorted(IN_PLACE)), SEEDS), min_size=2, max_size=2))
def a_compiled_model(steps: list[Any]) -> None:
    torch._dynamo.reset()
    arguments = dict(llm="llama", shape=("Linear", "layer-wise"), fold_projections="always", encoder="mt5", impl="auto")
    case = Case(functools.partial(built, **arguments))
    compiled = torch.compile(case.model, backend="eager")
    for name, number in [("back_to_float", 0), *steps]:
        note(f"{name}({number})")
        DONE[name] += 1
        case.change(name, number)
        asked(case, lambda model: logits(compiled if model is case.model else model, 0))
        TAKEN["compiled"] += 1


# All of them, and that they took the quick paths


def taken(test: Callable[[], None], **least: int) -> None:
    before = Counter(TAKEN)
    test()
    found = TAKEN - before
    assert found["errors"] < found["compared"] / 4, found
    for path, number in least.items():
        assert found[path.replace("_", " ")] >= number, found


@pytest.mark.slow
def test_any_change_between_two_calls() -> None:
    taken(calls_and_changes, folded=10, not_folded=10, CachedDecode=20, nested=1, interrupted=1)


@pytest.mark.slow
def test_any_change_between_two_steps_of_a_generation() -> None:
    taken(a_generation, CachedDecode=50)


@pytest.mark.slow
def test_any_change_between_two_requests() -> None:
    taken(served, joined=6, CachedDecode=30)


@pytest.mark.slow
def test_any_change_of_a_swapped_model() -> None:
    taken(a_swapped_model, swapped=15, CachedDecode=15)


@pytest.mark.slow
@compiles
def test_any_change_of_a_compiled_model() -> None:
    taken(a_compiled_model, compiled=3)


# What these tests have found


def test_a_model_whose_llm_was_taken_away_says_so_after_calls_too() -> None:
    model = tiny_model()
    given = inputs(model, 0)
    expected = model(**given).loss
    llm = model.unload()
    for call in (lambda: model(**given), lambda: model.generate(**{k: v for k, v in given.items() if k != "labels"})):
        with pytest.raises(ArgumentError, match=r"did not hand the source to its layers \[0, 1, 2\]"):
            call()
    attention_interface.attach(llm, model.config.language_layers)
    torch.testing.assert_close(model(**given).loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["another module", "a pickled cache"])
def test_a_generation_goes_on_with_the_gates_that_the_model_has_now(how: str) -> None:
    model = tiny_model()
    going = Going(model, 0, (torch.no_grad, None))
    with torch.no_grad():
        for which in range(2):
            going.step(model, which)
        if how == "another module":
            model.cross_attention[0] = copy.deepcopy(model.cross_attention[0])
        else:
            going.cache = pickle.loads(pickle.dumps(going.cache))
        model.cross_attention[0].adaption_gate.fill_(2.0)
        own = going.copy_for(model)
        before = own.copy_for(tiny_model()).step(tiny_model(), 2)["logits"]
        expected = own.step(model, 2)["logits"]
        torch.testing.assert_close(going.step(model, 2)["logits"], expected, rtol=1e-5, atol=1e-5)
    assert (expected - before).abs().max() > 1e-2
