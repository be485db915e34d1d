"""The registry of backends: what each says of itself, and backends from outside, of functions or of kernels."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import DEVICE, attention_inputs, mix_inputs
from tiny import batch, tiny_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from layalign import ArgumentError, BackendError, ops, reference
from layalign.ops import backends, checks
from layalign.ops.backends import Backend, KernelBackend

ROOT = Path(__file__).parents[2]
CALLS: list[str] = []


def mix_forward(hidden: list[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    CALLS.append("layer_mix_forward")
    return reference.layer_mix(list(hidden), weight, bias)


def mix_backward(
    grad: Tensor, x: Tensor, hidden: list[Tensor], weight: Tensor, need_weight: bool, need_hidden: bool
) -> tuple[Tensor | None, ...]:
    CALLS.append("layer_mix_backward")
    dmixed = (grad * (x > 0)).flatten(1)
    states = torch.stack([layer.flatten() for layer in hidden])
    return (
        dmixed @ states.T if need_weight else None,
        dmixed.sum(1).float() if need_weight else None,
        (weight.T @ dmixed).view(len(hidden), *x.shape[1:]) if need_hidden else None,
    )


def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor, residual: Any, mask: Any, scale: Any
) -> Any:
    CALLS.append("gated_cross_attention_forward")
    out = reference.gated_cross_attention(query, key, value, gate, residual, key_mask=mask, scale=scale)
    return out.contiguous(), query.new_zeros(query.shape[:3], dtype=torch.float32)


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    mask: Any,
    lse: Tensor,
    scale: Any,
    needs: Any,
) -> tuple[Tensor | None, ...]:
    CALLS.append("gated_cross_attention_backward")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    groups, grad = key.shape[1], grad.transpose(1, 2)
    keys, values = (each.repeat_interleave(query.shape[1] // groups, dim=1) for each in (key, value))
    scores = query @ keys.mT * scale
    weights = (scores if mask is None else scores.masked_fill(~mask[:, None, None], -torch.inf)).softmax(-1)
    into = gate * grad @ values.mT
    dscores = weights * (into - (into * weights).sum(-1, keepdim=True)) * scale
    of_heads = dscores @ keys, dscores.mT @ query, gate * weights.mT @ grad
    states = [each.unflatten(1, (groups, -1)).sum(2) for each in of_heads[1:]]
    found = of_heads[0], *states, (weights @ values * grad).sum().view(gate.shape)

    def laid_out(each: Tensor) -> Tensor:  # views of (B, rows, heads, d) memory
        return each.transpose(1, 2).contiguous().transpose(1, 2) if each.dim() == 4 else each

    return tuple(laid_out(each) if need else None for each, need in zip(found, needs, strict=True))


def decode(*inputs: Any) -> Tensor:
    CALLS.append("gated_cross_attention_decode")
    out: Tensor = attention_forward(*inputs)[0]
    CALLS.pop()
    return out


KERNELS = {
    "layer_mix_forward": mix_forward,
    "layer_mix_backward": mix_backward,
    "gated_cross_attention_forward": attention_forward,
    "gated_cross_attention_backward": attention_backward,
    "gated_cross_attention_decode": decode,
}


@pytest.fixture
def toy() -> Iterator[None]:
    """A backend "toy" of kernels."""
    CALLS.clear()
    backends.register_backend(KernelBackend("toy", KERNELS))
    yield
    backends.unregister_backend("toy")


def gradients(function: Any, inputs: list[Any], **options: Any) -> list[Tensor]:
    leaves = [
        [each.clone().requires_grad_() for each in given] if isinstance(given, list) else given.clone().requires_grad_()
        for given in inputs
    ]
    out = function(*leaves, **options)
    flat = [each for given in leaves for each in (given if isinstance(given, list) else [given])]
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), flat)]


def test_kernels_get_gradients_and_compilation_from_the_operations(toy: None) -> None:
    hidden, weight, bias, w2, b2 = mix_inputs(dtype=torch.float32)
    attended = list(attention_inputs(dtype=torch.float32))
    for function, inputs in (
        (ops.layer_mix, [hidden, weight, bias]),
        (ops.layer_projection, [hidden, weight, bias, w2, b2]),
        (ops.gated_cross_attention, attended),
    ):
        CALLS.clear()
        for found, expected in zip(
            gradients(function, inputs, impl="toy"), gradients(function, inputs, impl="torch"), strict=True
        ):
            torch.testing.assert_close(found, expected)
        assert any(name.endswith("_forward") for name in CALLS) and any(name.endswith("_backward") for name in CALLS)
    CALLS.clear()
    with torch.no_grad():
        ops.gated_cross_attention(*attended, impl="toy")
    assert CALLS == ["gated_cross_attention_decode"]
    attend = functools.partial(ops.gated_cross_attention, impl="toy")
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for found, expected in zip(
        gradients(compiled, attended), gradients(ops.gated_cross_attention, attended, impl="torch"), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_a_model_trains_and_answers_with_it(toy: None) -> None:
    plain, own = tiny_model(impl="torch"), tiny_model(impl="toy")
    inputs = batch(model=plain, sources=(6, 2, 3))
    for model in (plain, own):
        torch.manual_seed(0)  # the encoder's dropout
        model.train()
        model(**inputs).loss.backward()
    assert {"layer_mix_forward", "gated_cross_attention_backward"} <= set(CALLS)
    for (name, one), (_, other) in zip(plain.named_parameters(), own.named_parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, msg=name)
    inputs.pop("labels")
    prompts = [model.eval().generate(**inputs, max_new_tokens=4, do_sample=False) for model in (plain, own)]
    assert torch.equal(*prompts) and "gated_cross_attention_decode" in CALLS


def test_its_place_in_auto_and_what_it_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky(Backend):
        def accepts(self, operation: str, hidden: Any, *rest: Any, **options: Any) -> tuple[bool, str]:
            return len(hidden) != 3, "three layers are not for it"

        def pays(self, operation: str, hidden: Any, *rest: Any, **options: Any) -> bool:
            return len(hidden) != 4

    def own_mix(hidden: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
        CALLS.append("own_mix")
        return reference.layer_mix(hidden, weight, bias)

    def taken(layers: int, **options: Any) -> bool:
        CALLS.clear()
        hidden, weight, bias, *_ = mix_inputs(e=layers, dtype=torch.float32)
        found = ops.layer_mix(hidden, weight, bias, **options)
        torch.testing.assert_close(found, reference.layer_mix(hidden, weight, bias))
        return bool(CALLS)

    backends.register_backend(Picky("picky", {"layer_mix": own_mix}), before=backends.names()[0])
    try:
        assert backends.names() == ("picky", *backends.OWN)
        assert [taken(layers) for layers in (2, 3, 4)] == [True, False, False]
        assert taken(4, impl="picky")
        with pytest.raises(BackendError, match="layer_mix: impl='picky' .*: three layers are not for it"):
            taken(3, impl="picky")
        with pytest.raises(BackendError, match="gated_cross_attention: impl='picky' .*: picky has no gated_cross"):
            ops.gated_cross_attention(*attention_inputs(dtype=torch.float32), impl="picky")
        assert {"picky"} < {status.name for status in backends.report("cpu")}
    finally:
        backends.unregister_backend("picky")
    assert backends.names() == backends.OWN and not taken(2)
    with pytest.raises(ArgumentError, match="impl: expected 'auto' or one of triton, cuda, cpp, torch, got 'picky'"):
        taken(2, impl="picky")
    with pytest.raises(ArgumentError, match="impl: expected 'auto' or one of triton, cuda, cpp, torch, got 'picky'"):
        tiny_model(impl="picky")


@pytest.mark.parametrize(
    "backend, options, told",
    [
        ("toy", {}, "backend: expected a layalign.ops.backends.Backend, got 'toy'"),
        (Backend("cpp"), {}, "backend: expected a new name, got 'cpp'"),
        (Backend("auto"), {}, "backend: expected a name that is an identifier and not auto, got 'auto'"),
        (Backend("a-b"), {}, "backend: expected a name that is an identifier"),
        (Backend("a", {"mix": min}), {}, "backend: expected functions for some of .*layer_mix.*, got 'mix'"),
        (Backend("a"), {"before": "b"}, "before: expected one of triton, cuda, cpp, torch, got 'b'"),
    ],
)
def test_what_cannot_be_registered_is_named(backend: Any, options: Any, told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        backends.register_backend(backend, **options)
    for name in ("cpp", "nothing"):
        with pytest.raises(ArgumentError, match="name: expected a backend added by register_backend"):
            backends.unregister_backend(name)
    assert backends.names() == backends.OWN


def test_backends_answer_for_themselves(caplog: pytest.LogCaptureFixture) -> None:
    report = {status.name: status for status in backends.report(DEVICE)}
    assert list(report) == list(backends.names())
    assert report["torch"].available
    assert all(status.reason for status in report.values())
    hidden, weight, bias, *_ = mix_inputs()
    with pytest.raises(ArgumentError, match="impl: expected 'auto' or one of triton, cuda, cpp, torch, got 'fast'"):
        ops.layer_mix(hidden, weight, bias, impl="fast")
    for name, status in report.items():
        if not status.available and name != "torch":
            with pytest.raises(BackendError, match=f"layer_mix: impl='{name}' cannot serve this call: "):
                ops.layer_mix(hidden, weight, bias, impl=name)
    backends._LOGGED.clear()
    with caplog.at_level(logging.INFO, logger="layalign"):
        ops.layer_mix(hidden, weight, bias)
        ops.layer_mix(hidden, weight, bias)
    assert len([record for record in caplog.records if f"layer_mix on {DEVICE}: backend" in record.message]) == 1


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def accepted(operation: str, backend: str, device: str, dtype: torch.dtype, **sizes: int) -> bool:
    """Whether ``backend`` takes a call of these sizes, for tensors without memory."""
    empty = functools.partial(torch.empty, device=device, dtype=dtype)
    if operation == "gated_cross_attention":
        size = sizes.get("head size", 64)
        attended = empty(1, 2, 3, size), empty(1, 2, 5, size), empty(1, 2, 5, size), empty(1)
        return backends.accepts(operation, backend, *attended)[0]
    layers, slots = sizes.get("layers", 4), sizes.get("slots", 4)
    mix = [empty(1, 3, 8)] * layers, empty(slots, layers), empty(slots)
    more = () if operation == "layer_mix" else (empty(6, 8), None)
    return backends.accepts(operation, backend, *mix, *more)[0]


def test_the_page_on_backends_is_what_the_checks_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `(\w+)` \| `(\w+)` \| ([^|]+) \| (.*) \| ([^|]+) \|$", page.split("## How")[0], re.MULTILINE
    )
    named = {(operation, backend, place[:3]) for operation, backend, place, *_ in rows}
    operations = set(ops.__all__) - {"register_backend"}
    served = {(each, name, kind) for each in operations for name in backends.OWN for kind in on(name)}
    assert named == served
    for operation, backend, place, answers, limits in rows:
        device = {"CPU": "cpu", "GPU": "cuda"}[place[:3]]
        monkeypatch.setattr(checks, "is_sm_100", lambda _, place=place: place.endswith("sm_100"))
        with FakeTensorMode():
            found = [accepted(operation, backend, device, dtype) for dtype in DTYPES]
            assert found == [answer == "yes" for answer in answers.split(" | ")], (operation, backend, place)
            known = dict(re.findall(r"([a-z ]+) up to (\d+)", limits))
            names = ("head size",) if operation == "gated_cross_attention" else ("layers", "slots")
            for name in names:
                most = int({key.strip(): value for key, value in known.items()}.get(name, 1024))
                assert accepted(operation, backend, device, torch.float16, **{name: most})
                beyond = accepted(operation, backend, device, torch.float16, **{name: most + 1})
                assert beyond == (limits == "none"), (operation, backend, place)


def on(backend: str) -> list[str]:
    """The kinds of devices that a backend of the library is for, as the page calls them."""
    return [{"cpu": "CPU", "cuda": "GPU"}[device] for device in backends.get(backend).devices]
