"""A formula that somebody edits is the one that runs, on every path: nothing reads a module's parameters past it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from published_tiny import data, published, published_model
from tiny import batch, tiny_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

import layalign
from layalign import ops
from layalign.modeling import cross_attention as passes
from layalign.modeling.cache import SourceKeyValues
from layalign.nn import (
    EncoderAligner,
    GatedCrossAttention,
    WeightedLinearProjector,
    aligner,
    cross_attention,
    inspection,
)
from layalign.serving.http.decoding import Decoder, Inputs

Edit = Callable[[Any, pytest.MonkeyPatch], None]


def tanh_forward(self: Any, query: Tensor, key: Tensor, value: Tensor, residual: Any = None, **rest: Any) -> Tensor:
    return ops.gated_cross_attention(
        query, key, value, torch.tanh(self.adaption_gate), residual, **rest, impl=self.impl
    )


def tanh_gate(self: Any) -> Tensor:
    return torch.tanh(self.adaption_gate)


class TanhForward(GatedCrossAttention):
    forward = tanh_forward  # type: ignore[assignment]


class TanhGate(GatedCrossAttention):
    effective_gate = tanh_gate


class Own(nn.Module):
    """Nothing of ours, and another name for the gate."""

    def __init__(self, gate: nn.Parameter) -> None:
        super().__init__()
        self.own_gate = gate

    def forward(self, query: Tensor, key: Tensor, value: Tensor, residual: Any = None, **rest: Any) -> Tensor:
        return ops.gated_cross_attention(query, key, value, torch.tanh(self.own_gate), residual, **rest)


class Tanh(nn.Module):
    def forward(self, gate: Tensor) -> Tensor:
        return torch.tanh(gate)


def as_subclass(cls: type) -> Edit:
    return lambda model, _: [setattr(each, "__class__", cls) for each in model.cross_attention]


def replace_modules(model: Any, _: pytest.MonkeyPatch) -> None:
    for index, module in enumerate(model.cross_attention):
        model.cross_attention[index] = Own(module.adaption_gate)


def parametrized(model: Any, _: pytest.MonkeyPatch) -> None:
    for module in model.cross_attention:
        parametrize.register_parametrization(module, "adaption_gate", Tanh())


def hooked(model: Any, _: pytest.MonkeyPatch) -> None:
    for module in model.cross_attention:

        def hook(module: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
            return (
                kwargs["residual"]
                + (out - kwargs["residual"]) * torch.tanh(module.adaption_gate) / module.adaption_gate
            )

        module.register_forward_hook(hook, with_kwargs=True)


def in_the_file(patch: pytest.MonkeyPatch, cls: type, module: Any, **changes: Any) -> None:
    """As if the source had been written so: it is the only ``forward`` that was ever there."""
    for name, function in changes.items():
        patch.setattr(cls, name, function)
    patch.setitem(inspection._FORWARDS, cls, cls.forward)  # type: ignore[attr-defined]
    tried = functools.cache(module.computes_the_reference.__wrapped__)
    patch.setattr(module, "computes_the_reference", tried)
    if hasattr(passes, "computes_the_reference"):
        patch.setattr(passes, "computes_the_reference", tried)


EDITS: dict[str, Edit] = {
    "class_forward": lambda model, patch: patch.setattr(GatedCrossAttention, "forward", tanh_forward),
    "class_gate": lambda model, patch: patch.setattr(GatedCrossAttention, "effective_gate", tanh_gate),
    "file_forward": lambda model, patch: in_the_file(patch, GatedCrossAttention, cross_attention, forward=tanh_forward),
    "file_gate": lambda model, patch: in_the_file(
        patch, GatedCrossAttention, cross_attention, effective_gate=tanh_gate
    ),
    "subclass_forward": as_subclass(TanhForward),
    "subclass_gate": as_subclass(TanhGate),
    "instance_forward": lambda model, _: [
        setattr(each, "forward", functools.partial(tanh_forward, each)) for each in model.cross_attention
    ],
    "instance_gate": lambda model, _: [
        setattr(each, "effective_gate", functools.partial(tanh_gate, each)) for each in model.cross_attention
    ],
    "parametrization": parametrized,
    "hook": hooked,
    "own_module": replace_modules,
}


def gates(model: Any) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name.startswith("cross_attention.")]


def results(model: Any, call: Any = None) -> dict[str, Tensor]:
    """Logits of two passes and of a decoding over the cache, the server's, losses and the gates' gradients."""
    inputs, found, call = batch(model=model, targets=None), {}, model if call is None else call
    with torch.no_grad():
        for name in ("first", "second"):
            output = call(**inputs, use_cache=True)
            found[name] = output.logits
        tokens, cache = inputs["input_ids"][:, -1:], output.past_key_values
        mask = inputs["attention_mask"]
        for step in range(3):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            output = call(input_ids=tokens, attention_mask=mask, past_key_values=cache)
            found[f"decode {step}"] = output.logits
        server = Decoder(model, 0)
        state, found["served"] = server.prefill(
            [Inputs([5, 6, 7], model.build_inputs(torch.ones(1, 3))["input_ids"][0].tolist())]
        )
        for step in range(3):
            found[f"served {step}"] = server.step(state, [7])
    for step in ("trained", "trained again"):
        model.zero_grad()
        found[step] = call(**batch(model=model)).loss
        found[step].backward()
        found[f"{step}, gradient"] = torch.cat([gate.grad.clone().flatten() for gate in gates(model)])
    return {name: tensor.detach() for name, tensor in found.items()}


@functools.cache
def expected(**changes: Any) -> dict[str, Tensor]:
    """Of a model whose gates hold the tanh already; the chain rule by hand."""
    model = tiny_model(**changes)
    slope = torch.cat([1 - gate.detach().tanh() ** 2 for gate in gates(model)])
    with torch.no_grad():
        for gate in gates(model):
            gate.tanh_()
    return {name: tensor * slope if "gradient" in name else tensor for name, tensor in results(model).items()}


def assert_obeyed(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_gate_is_seen_in_every_call(edit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, model = expected(fold_projections="always"), tiny_model(fold_projections="always")
    EDITS[edit](model, monkeypatch)
    assert_obeyed(results(model), wanted)


@pytest.mark.parametrize("name", ["forward", "effective_gate"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_gate_that_is_edited_between_two_calls_is_seen(
    name: str, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 4, rows, 16) for rows in (1, 9, 9))
    residual, module = torch.zeros(1, 1, 4, 16), GatedCrossAttention(gate=2.0)
    states, found = SourceKeyValues((0,), (key,), (value,), None), []
    for call in range(4):
        if call == 2:
            monkeypatch.setattr(GatedCrossAttention, name, tanh_forward if name == "forward" else tanh_gate)
        with torch.set_grad_enabled(grad), passes.one_pass(states, (module,)) as one:
            found.append(one.attend(0, query.clone().requires_grad_(grad), residual.clone(), None).detach())
    torch.testing.assert_close(found[1], found[0])
    for each in found[2:]:
        torch.testing.assert_close(each, found[0] * torch.tensor(2.0).tanh() / 2)


@pytest.mark.parametrize("edit", ["class_gate", "class_forward", "parametrization"])
def test_an_edited_gate_is_seen_in_compiled_calls(edit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 4, rows, 16) for rows in (5, 9, 9))
    residual, module = torch.zeros(1, 5, 4, 16), GatedCrossAttention(gate=2.0)
    states = SourceKeyValues((0,), (key,), (value,), None)
    one = passes.OnePass(states, (module,))
    plain = one.attend(0, query, residual, None)
    EDITS[edit](SimpleNamespace(cross_attention=[module]), monkeypatch)
    attend = torch.compile(lambda query, residual: one.attend(0, query, residual, None), backend="eager")
    torch.testing.assert_close(attend(query, residual), plain * torch.tensor(2.0).tanh() / 2)


def doubled(forward: Callable[..., Any]) -> Callable[..., Any]:
    def edited(self: Any, *args: Any) -> Any:
        found = forward(self, *args)
        return 2 * found if isinstance(found, Tensor) else tuple((2 * key, 2 * value) for key, value in found)

    return edited


class DoubledProjector(WeightedLinearProjector):
    forward = doubled(WeightedLinearProjector.forward)


class DoubledAligner(EncoderAligner):
    forward = doubled(EncoderAligner.forward)


ALIGNER_EDITS: dict[str, Edit] = {
    "class": lambda model, patch: patch.setattr(EncoderAligner, "forward", DoubledAligner.forward),
    "projector_class": lambda model, patch: patch.setattr(WeightedLinearProjector, "forward", DoubledProjector.forward),
    "file": lambda model, patch: in_the_file(patch, EncoderAligner, aligner, forward=DoubledAligner.forward),
    "projector_file": lambda model, patch: in_the_file(
        patch, WeightedLinearProjector, aligner, forward=DoubledProjector.forward
    ),
    "subclass": lambda model, _: setattr(model.encoder_aligner, "__class__", DoubledAligner),
    "projector_subclass": lambda model, _: setattr(model.encoder_aligner.projector, "__class__", DoubledProjector),
    "instance": lambda model, _: setattr(
        model.encoder_aligner, "forward", functools.partial(DoubledAligner.forward, model.encoder_aligner)
    ),
    "hook": lambda model, _: model.encoder_aligner.register_forward_hook(
        lambda module, args, pairs: [(2 * key, 2 * value) for key, value in pairs]
    ),
    "projector_hook": lambda model, _: model.encoder_aligner.projector.register_forward_hook(lambda m, a, out: 2 * out),
}


@pytest.mark.parametrize("fold", ["always", "never"])
@pytest.mark.parametrize("edit", ALIGNER_EDITS)
def test_an_edited_aligner_is_seen(edit: str, fold: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, model = tiny_model(fold_projections=fold), tiny_model(fold_projections=fold)
    with torch.no_grad():
        for parameter in wanted.encoder_aligner.projector.fc2.parameters():
            parameter.mul_(2)
    inputs = batch(model=model)
    first, second = wanted(**inputs).loss, model(**inputs).loss
    ALIGNER_EDITS[edit](model, monkeypatch)
    for _ in range(2):
        torch.testing.assert_close(model(**inputs).loss, first)
    assert (first - second).abs() > 1e-4


class DoubledLinear(nn.Linear):
    def forward(self, states: Tensor) -> Tensor:
        return 2 * super().forward(states)


@pytest.mark.parametrize("name", ["fc1", "fc2"])
def test_a_compiled_aligner_calls_maps_of_another_class(name: str) -> None:
    torch.compiler.reset()
    model = tiny_model().encoder_aligner
    hidden = [torch.randn(1, 3, 24) for _ in range(model.projector.fc1.in_features)]
    getattr(model.projector, name).__class__ = DoubledLinear
    wanted = model(hidden)
    found = torch.compile(model, backend="eager")(hidden)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["EncoderAligner", "WeightedLinearProjector", "AdaptedAttention"])
def test_an_edit_of_a_swapped_modules_own_class_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, plain, swapped = data(), published_model(), published_model()
    layalign.swap_modules(swapped)
    before = swapped(**inputs)
    cls = getattr(published, name)
    forward = cls.forward

    def edited(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = forward(self, *args, **kwargs)
        if name == "AdaptedAttention":
            return (2 * found[0], *found[1:])
        return 2 * found if isinstance(found, Tensor) else [(2 * key, 2 * value) for key, value in found]

    monkeypatch.setattr(cls, "forward", edited)
    torch.testing.assert_close(swapped(**inputs), plain(**inputs), rtol=1e-4, atol=1e-5)
    assert (swapped(**inputs) - before).abs() > 1e-4
