"""The kernels of layer mix and projection, forward and backward, over every backend that has some here.

Without a GPU that is Triton's interpreter, the C++ kernels where the extension is built, and the CUDA kernels'
emulation where LAYALIGN_EMULATE_CUDA names it.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import DEVICE, DTYPES, mix_inputs, serving, skip_unserved, within_budget

from layalign import BackendError, ops, reference
from layalign.ops import backends, plans

BACKENDS = [name for name in serving("layer_mix", "layer_projection") if name != "torch"]
every_backend = pytest.mark.parametrize("impl", BACKENDS)


def launchers(impl: str):
    """(forward, backward) of the layer mix, below the operation."""
    return tuple(backends.launcher(impl, f"layer_mix_{way}") for way in ("forward", "backward"))


SHAPES = [
    (1, 2, 1, 1, 1),
    (5, 6, 2, 7, 11),
    (24, 64, 1, 3, 70),
    (33, 4, 1, 63, 59),
    (64, 6, 2, 9, 8),
    (3, 130, 1, 2, 40),
]
OUTPUTS = 13


def on_device(value):
    return [tensor.to(DEVICE) for tensor in value] if isinstance(value, list) else value.to(DEVICE)


def inputs(shape, dtype, seed: int = 0):
    """hidden, mix weight and bias, weight and bias, on the device, all requiring gradients."""
    arguments = [on_device(argument) for argument in mix_inputs(*shape, dtype=dtype, seed=seed)]
    for leaf in (*arguments[0], *arguments[1:]):
        leaf.requires_grad_()
    return arguments


def leaves(arguments) -> list[torch.Tensor]:
    return [*arguments[0], *arguments[1:]]


def gradients(function, arguments, seed: int = 1) -> list[torch.Tensor]:
    out = function(*arguments)
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    return list(torch.autograd.grad(out, [leaf for leaf in leaves(arguments) if leaf.requires_grad], grad))


def same_values(arguments, dtype):
    copies = [([t.detach().to(dtype) for t in a] if isinstance(a, list) else a.detach().to(dtype)) for a in arguments]
    for leaf in leaves(copies):
        leaf.requires_grad_()
    return copies


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operation", ["layer_mix", "layer_projection"])
def test_gradients_within_the_error_budget(
    impl: str, operation: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    skip_unserved(impl, dtype)
    count = 3 if operation == "layer_mix" else 5
    arguments = inputs(shape, dtype)[:count]
    ours = lambda *a: getattr(ops, operation)(*a, impl=impl)  # noqa: E731
    theirs = getattr(reference, operation)
    exact = gradients(theirs, same_values(arguments, torch.float64))
    plain = gradients(theirs, same_values(arguments, dtype))
    for found, usual, true in zip(gradients(ours, arguments), plain, exact, strict=True):
        assert found.shape == true.shape
        within_budget(found, usual, true, dtype)


@every_backend
@pytest.mark.parametrize("per_slot", [False, True])
@pytest.mark.parametrize("plan", plans.PLANS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", ["none", "mix only", "both", "per slot"])
def test_every_plan_of_the_projection(
    impl: str, plan: str, per_slot: bool, dtype: torch.dtype, bias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_unserved(impl, dtype)
    monkeypatch.setattr(plans, "plan", lambda *_, **__: plan)
    hidden, w1, b1, w2, b2 = inputs((5, 6, 2, 7, 40), dtype)
    if per_slot:
        w2 = torch.randn(6, OUTPUTS, 40, generator=torch.Generator().manual_seed(5)).to(w2).requires_grad_()
    if bias == "per slot":
        b2 = torch.randn(6, OUTPUTS, generator=torch.Generator().manual_seed(6)).to(b2).requires_grad_()
    arguments = [hidden, w1, None if bias == "none" else b1, w2, b2 if bias in ("both", "per slot") else None]
    found = ops.layer_projection(*arguments, impl=impl)
    double = [None if a is None else [t.double() for t in a] if isinstance(a, list) else a.double() for a in arguments]
    exact, plain = reference.layer_projection(*double), reference.layer_projection(*arguments)
    within_budget(found.detach(), plain.detach(), exact.detach(), dtype)
    wanted = [tensor for tensor in (*hidden, *arguments[1:]) if tensor is not None]
    for ours, usual, true in zip(
        torch.autograd.grad(found.float().square().sum(), wanted),
        torch.autograd.grad(plain.float().square().sum(), wanted),
        torch.autograd.grad(exact.square().sum(), wanted),
        strict=True,
    ):
        within_budget(ours, usual, true.double(), dtype)


@every_backend
def test_only_what_is_needed_is_computed(impl: str) -> None:
    hidden, w1, b1, *_ = (x if isinstance(x, list) else x.detach() for x in inputs((3, 4, 1, 3, 8), torch.float32))
    hidden = [layer.detach() for layer in hidden]
    layer_mix_forward, layer_mix_backward = launchers(impl)
    x = layer_mix_forward(hidden, w1, b1)
    assert layer_mix_backward(x, x, hidden, w1, True, False)[2] is None
    weight_grad, bias_grad, hidden_grad = layer_mix_backward(x, x, hidden, w1, False, True)
    assert weight_grad is None and bias_grad is None and hidden_grad.shape == (3, 1, 3, 8)


@every_backend
def test_x_is_not_kept_for_the_backward(impl: str) -> None:
    arguments = inputs((3, 8, 2, 16, 32), torch.float32)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        ops.layer_projection(*arguments, impl=impl)
    assert (8, 2, 16, 32) not in kept
    assert max(torch.Size(shape).numel() for shape in kept) <= 2 * 16 * 32


@every_backend
@pytest.mark.parametrize("operation", ["layer_mix", "layer_projection"])
def test_backward_is_bit_equal_twice(impl: str, operation: str) -> None:
    count = 3 if operation == "layer_mix" else 5
    arguments = inputs((9, 10, 2, 21, 33), torch.float32)[:count]
    ours = lambda *a: getattr(ops, operation)(*a, impl=impl)  # noqa: E731
    for first, second in zip(gradients(ours, arguments), gradients(ours, arguments), strict=True):
        assert torch.equal(first, second)


@every_backend
def test_poisoned_outputs_are_overwritten(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, w1, b1, *_ = inputs((5, 6, 2, 7, 11), torch.float32)
    expected = reference.layer_mix(hidden, w1, b1)
    empty = torch.empty
    poisoned = lambda *a, **k: empty(*a, **k).fill_(torch.nan)  # noqa: E731
    layer_mix_forward, layer_mix_backward = launchers(impl)
    monkeypatch.setattr(torch, "empty", poisoned)
    x = layer_mix_forward([h.detach() for h in hidden], w1.detach(), b1.detach())
    parts = layer_mix_backward(torch.ones_like(x), x, [h.detach() for h in hidden], w1.detach(), True, True)
    monkeypatch.undo()
    torch.testing.assert_close(x, expected.detach())
    assert all(torch.isfinite(part).all() for part in parts)


@every_backend
def test_layers_of_different_strides_and_views(impl: str) -> None:
    hidden, w1, b1, *_ = inputs((4, 6, 2, 7, 12), torch.float32)
    with torch.no_grad():
        wide = torch.full((2, 9, 24), torch.nan, device=DEVICE)
        wide[:, 1:8, 5:17] = hidden[0]
        turned = hidden[1].transpose(0, 1).contiguous().transpose(0, 1)
        last = hidden[2].transpose(1, 2).contiguous().transpose(1, 2)  # no unit last stride
        views = [wide[:, 1:8, 5:17], turned, last, hidden[3]]
        for shift in range(4):  # each kind of view comes first once: the first layer decides the layout
            moved = views[shift:] + views[:shift]
            weight = torch.cat([w1[:, shift:], w1[:, :shift]], dim=1)
            found = ops.layer_mix(moved, weight, b1, impl=impl)
            torch.testing.assert_close(found, reference.layer_mix(hidden, w1, b1))


@every_backend
@settings(max_examples=12, deadline=None)
@given(
    e=st.integers(1, 20), slots=st.integers(1, 12).map(lambda n: 2 * n), b=st.integers(1, 2), s=st.integers(1, 9),
    d=st.integers(1, 70), dtype=st.sampled_from(DTYPES[:2]),
)  # fmt: skip
def test_drawn_shapes(impl: str, e: int, slots: int, b: int, s: int, d: int, dtype: torch.dtype) -> None:
    arguments = inputs((e, slots, b, s, d), dtype, seed=e * 97 + d)
    exact = reference.layer_projection(*same_values(arguments, torch.float64)).detach()
    plain = reference.layer_projection(*arguments).detach()
    within_budget(ops.layer_projection(*arguments, impl=impl).detach(), plain, exact, dtype)


@every_backend
@pytest.mark.parametrize("shape", [(2, 4, 0, 3, 5), (2, 4, 2, 0, 5)])
def test_empty_batches_and_sources(impl: str, shape: tuple[int, ...]) -> None:
    arguments = inputs(shape, torch.float32)
    out = ops.layer_projection(*arguments, impl=impl)
    assert out.shape == (4, *shape[2:4], OUTPUTS)
    out.sum().backward()
    assert arguments[1].grad.abs().sum() == 0 and arguments[3].grad.abs().sum() == 0


@every_backend
@pytest.mark.parametrize("plan", plans.PLANS)
def test_opcheck(impl: str, plan: str) -> None:
    hidden, w1, b1, w2, b2 = inputs((3, 4, 2, 5, 16), torch.float32)
    torch.library.opcheck(torch.ops.layalign.layer_mix, (hidden, w1, b1, impl))
    torch.library.opcheck(torch.ops.layalign.layer_mix, (hidden, w1, None, impl))
    torch.library.opcheck(torch.ops.layalign.layer_projection, (hidden, w1, b1, w2, b2, plan, impl))
    torch.library.opcheck(torch.ops.layalign.layer_projection, (hidden, w1, None, w2, None, plan, impl))


@every_backend
def test_compiles_with_gradients_and_dynamic_length(impl: str) -> None:
    def loss(*arguments):
        return ops.layer_projection(*arguments, impl=impl).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (4, 7):
        arguments = inputs((3, 4, 1, length, 8), torch.float32)
        expected = torch.autograd.grad(loss(*arguments), leaves(arguments))
        found = torch.autograd.grad(compiled(*arguments), leaves(arguments))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@every_backend
def test_a_second_backward_is_refused(impl: str) -> None:
    arguments = inputs((3, 4, 1, 2, 8), torch.float32)[:3]
    out = ops.layer_mix(*arguments, impl=impl).square().sum()
    (first,) = torch.autograd.grad(out, arguments[1], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), arguments[1])


@every_backend
def test_autocast_casts_like_torch(impl: str) -> None:
    arguments = inputs((3, 4, 1, 2, 8), torch.float32)
    with torch.autocast(DEVICE, dtype=torch.float16):
        ours = ops.layer_projection(*arguments, impl=impl)
        theirs = ops.layer_projection(*arguments, impl="torch")
    assert ours.dtype == theirs.dtype == torch.float16
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


@every_backend
def test_what_the_kernels_do_not_take_is_said(impl: str) -> None:
    hidden, w1, b1, *_ = inputs((3, 4, 1, 2, 8), torch.float64)
    with pytest.raises(BackendError, match="float64 is left to impl='torch'"):
        ops.layer_mix(hidden, w1, b1, impl=impl)
    assert ops.layer_mix(hidden, w1, b1).dtype == torch.float64
    many = [hidden[0].float()] * 65
    with pytest.raises(BackendError, match="at most 64 layers into 256 slots, got 65 and 4"):
        ops.layer_mix(many, torch.zeros(4, 65, device=DEVICE), impl=impl)


def test_plans_follow_the_rule_and_measured_tables() -> None:
    assert plans.rule(24, 64, 2048, 64, 512, False) == "fused"
    assert plans.rule(24, 64, 2048, 4096, 512, False) == "two_step"
    assert plans.rule(24, 64, 2048, 64, 512, True) == "two_step"
    entry = dict(layers=24, slots=64, width=2048, outputs=4096, per_slot=False)
    entries = (dict(entry, rows=512, plan="fused"), dict(entry, rows=8192, plan="two_step"))
    assert plans.measured(entries, 24, 64, 2048, 4096, 700, False) == "fused"
    assert plans.measured(entries, 24, 64, 2048, 4096, 5000, False) == "two_step"
    assert plans.measured(entries, 24, 64, 2048, 4096, 100, False) is None  # too far from anything measured
    assert plans.measured(entries, 12, 64, 2048, 4096, 512, False) is None
