"""The layer projection, forward and backward, over every backend that has some kernels here, and plain torch.

Without a GPU that is Triton's interpreter, the C++ kernels where the extension is built, and the CUDA kernels'
emulation where LAYALIGN_EMULATE_CUDA names it.
"""

from __future__ import annotations

import functools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import (
    DEVICE,
    DTYPES,
    MIX_SHAPES,
    doubled,
    mix_arguments,
    mix_gradients,
    mix_inputs,
    mix_leaves,
    same_values,
    serving,
    skip_unserved,
    within_budget,
)

from layalign import ops, reference
from layalign.ops import backends, checks
from layalign.ops.layer_projection import PLANS, choose_plan

every_backend = pytest.mark.parametrize("impl", [name for name in serving("layer_projection") if name != "torch"])
OUTPUTS = 13  # those of mix_inputs


@pytest.mark.slow
@pytest.mark.parametrize("impl", serving("layer_projection"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2, 1, 1, 1), (5, 6, 2, 7, 11), (33, 4, 1, 63, 59), (64, 6, 2, 97, 8)])
def test_result_within_the_error_budget(impl: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    skip_unserved(impl, dtype)
    low = mix_inputs(*shape, dtype=dtype)
    exact = reference.layer_projection(*doubled(low))
    within_budget(ops.layer_projection(*low, impl=impl), reference.layer_projection(*low), exact, dtype)


@pytest.mark.slow
@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MIX_SHAPES)
def test_gradients_within_the_error_budget(impl: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    skip_unserved(impl, dtype)
    arguments = mix_arguments(shape, dtype)
    exact = mix_gradients(reference.layer_projection, same_values(arguments, torch.float64))
    plain = mix_gradients(reference.layer_projection, same_values(arguments, dtype))
    found = mix_gradients(functools.partial(ops.layer_projection, impl=impl), arguments)
    for ours, usual, true in zip(found, plain, exact, strict=True):
        assert ours.shape == true.shape
        within_budget(ours, usual, true, dtype)


@pytest.mark.slow
@every_backend
@pytest.mark.parametrize("per_slot", [False, True])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", ["none", "mix only", "both", "per slot"])
def test_every_plan_stays_within_the_error_budget(
    impl: str, plan: str, per_slot: bool, dtype: torch.dtype, bias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_unserved(impl, dtype)
    monkeypatch.setattr(sys.modules[choose_plan.__module__], "choose_plan", lambda _: plan)
    hidden, w1, b1, w2, b2 = mix_arguments((5, 6, 2, 7, 40), dtype)
    if per_slot:
        w2 = torch.randn(6, OUTPUTS, 40, generator=torch.Generator().manual_seed(5)).to(w2).requires_grad_()
    if bias == "per slot":
        b2 = torch.randn(6, OUTPUTS, generator=torch.Generator().manual_seed(6)).to(b2).requires_grad_()
    arguments = [hidden, w1, None if bias == "none" else b1, w2, b2 if bias in ("both", "per slot") else None]
    found = ops.layer_projection(*arguments, impl=impl)
    exact, plain = reference.layer_projection(*doubled(arguments)), reference.layer_projection(*arguments)
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
def test_x_is_not_kept_for_the_backward(impl: str) -> None:
    arguments = mix_arguments((3, 8, 2, 16, 32), torch.float32)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        ops.layer_projection(*arguments, impl=impl)
    assert (8, 2, 16, 32) not in kept
    assert max(torch.Size(shape).numel() for shape in kept) <= 2 * 16 * 32


@pytest.mark.slow
@every_backend
@settings(max_examples=12, deadline=None)
@given(
    e=st.integers(1, 20), slots=st.integers(1, 12).map(lambda n: 2 * n), b=st.integers(1, 2), s=st.integers(1, 9),
    d=st.integers(1, 70), dtype=st.sampled_from(DTYPES[:2]),
)  # fmt: skip
def test_drawn_shapes_stay_within_the_error_budget(
    impl: str, e: int, slots: int, b: int, s: int, d: int, dtype: torch.dtype
) -> None:
    arguments = mix_arguments((e, slots, b, s, d), dtype, seed=e * 97 + d)
    exact = reference.layer_projection(*same_values(arguments, torch.float64)).detach()
    plain = reference.layer_projection(*arguments).detach()
    within_budget(ops.layer_projection(*arguments, impl=impl).detach(), plain, exact, dtype)


@every_backend
@pytest.mark.parametrize("shape", [(2, 4, 0, 3, 5), (2, 4, 2, 0, 5)])
def test_empty_batches_and_sources_give_empty_results_and_zero_gradients(impl: str, shape: tuple[int, ...]) -> None:
    arguments = mix_arguments(shape, torch.float32)
    out = ops.layer_projection(*arguments, impl=impl)
    assert out.shape == (4, *shape[2:4], OUTPUTS)
    out.sum().backward()
    assert arguments[1].grad.abs().sum() == 0 and arguments[3].grad.abs().sum() == 0


@pytest.mark.slow
@every_backend
def test_compiles_with_gradients_and_dynamic_length(impl: str) -> None:
    def loss(*arguments):
        return ops.layer_projection(*arguments, impl=impl).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (4, 7):
        arguments = mix_arguments((3, 4, 1, length, 8), torch.float32)
        expected = torch.autograd.grad(loss(*arguments), mix_leaves(arguments))
        found = torch.autograd.grad(compiled(*arguments), mix_leaves(arguments))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@every_backend
def test_autocast_casts_like_torch(impl: str) -> None:
    arguments = mix_arguments((3, 4, 1, 2, 8), torch.float32)
    with torch.autocast(DEVICE, dtype=torch.float16):
        ours = ops.layer_projection(*arguments, impl=impl)
        theirs = ops.layer_projection(*arguments, impl="torch")
    assert ours.dtype == theirs.dtype == torch.float16
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def test_the_fused_kernel_serves_a_shared_weight_of_one_block() -> None:
    assert choose_plan(torch.empty(64, 2048, device="meta")) == "fused"
    assert choose_plan(torch.empty(4096, 2048, device="meta")) == "two_step"
    assert choose_plan(torch.empty(64, 64, 2048, device="meta")) == "two_step"


def test_gradients_of_plain_torch_equal_finite_differences() -> None:
    hidden, *weights = (x if isinstance(x, list) else x.requires_grad_() for x in mix_inputs(e=3, slots=4, s=3, d=4))
    hidden = [layer.requires_grad_() for layer in hidden]
    w2 = torch.randn(5, 4, dtype=torch.float64, requires_grad=True, device=DEVICE)
    function = lambda *a: ops.layer_projection(list(a[:3]), *a[3:], impl="torch")  # noqa: E731
    assert torch.autograd.gradcheck(function, (*hidden, weights[0], weights[1], w2))


@pytest.mark.slow
@every_backend
def test_backward_is_bit_equal_twice(impl: str) -> None:
    arguments = mix_arguments((9, 10, 2, 21, 33), torch.float32)
    ours = functools.partial(ops.layer_projection, impl=impl)
    for first, second in zip(mix_gradients(ours, arguments), mix_gradients(ours, arguments), strict=True):
        assert torch.equal(first, second)


@pytest.mark.slow
@every_backend
@pytest.mark.parametrize("plan", PLANS)
def test_operators_pass_opcheck(impl: str, plan: str) -> None:
    hidden, w1, b1, w2, b2 = mix_arguments((3, 4, 2, 5, 16), torch.float32)
    torch.library.opcheck(torch.ops.layalign.layer_projection, (hidden, w1, b1, w2, b2, plan, impl))
    torch.library.opcheck(torch.ops.layalign.layer_projection, (hidden, w1, None, w2, None, plan, impl))
    if backends.get(impl).reads_rows:
        rows = torch.tensor([1, 4, 7], device=DEVICE)
        torch.library.opcheck(torch.ops.layalign.layer_projection, (hidden, w1, b1, w2, b2, plan, impl, rows))


@pytest.mark.parametrize("impl", serving("layer_projection"))
@pytest.mark.parametrize("folded", [False, True])
def test_only_the_rows_asked_for_are_projected(impl: str, folded: bool) -> None:
    hidden, *weights = mix_inputs(dtype=torch.float32)
    if folded:
        weights[2:] = [torch.stack([each * (1 + slot) for slot in range(6)]) for each in weights[2:]]
    rows, found = torch.tensor([1, 2, 5, 6, 9, 13], device=DEVICE), []
    for call in (
        lambda *given: ops.layer_projection(*given, rows=rows, impl=impl),
        lambda hidden, *rest: reference.layer_projection(checks.select_rows(hidden, rows), *rest),
    ):
        leaves = [h.clone().requires_grad_() for h in hidden], *(w.clone().requires_grad_() for w in weights)
        y = call(*leaves)
        grads = torch.autograd.grad((y * torch.arange(y.numel(), device=DEVICE).cos().view_as(y)).sum(),
                                    (*leaves[0], *leaves[1:]))  # fmt: skip
        found.append([y.detach(), *grads])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("impl", serving("layer_projection"))
def test_compiles_into_one_graph_with_dynamic_source_length(impl: str) -> None:
    pytest.importorskip("torch._dynamo")
    project = functools.partial(ops.layer_projection, impl=impl)
    compiled = torch.compile(lambda *a: project(*a), fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9, 12):
        inputs = mix_inputs(s=length, dtype=torch.float32)
        torch.testing.assert_close(compiled(*inputs), project(*inputs))
