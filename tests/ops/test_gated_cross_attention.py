"""Gated cross-attention as an operation, over every backend here: results, schema, compile, autocast, gradient."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys

import pytest
import torch
from op_cases import (
    BACKENDS,
    DEVICE,
    DTYPES,
    attention_inputs,
    inputs,
    make_mask,
    serving,
    skip_unserved,
    within_budget,
)
from torch import Tensor

from layalign import BackendError, ops, reference

with_torch = pytest.mark.parametrize("impl", serving("gated_cross_attention"))


@pytest.fixture(params=BACKENDS)
def impl(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_operators_pass_opcheck(impl: str, masked: bool) -> None:
    low = inputs(2, 4, 2, 3, 5, 16)
    mask = make_mask("random", 2, 5) if masked else None
    leaves = [x.requires_grad_() for x in low]
    residual = leaves[4] if masked else None
    torch.library.opcheck(torch.ops.layalign.gated_cross_attention.default, (*leaves[:4], residual, mask, None, impl))
    detached = [x.detach() for x in low]
    few = (*detached[:4], detached[4] if masked else None, mask, 0.3, impl)
    torch.library.opcheck(torch.ops.layalign.gated_cross_attention_decode.default, few)
    query, key, value, gate, _ = detached
    out, lse = torch.ops.layalign.gated_cross_attention(query, key, value, gate, None, mask, None, impl)
    for needs in ([True] * 4, [False, True, False, False], [False, False, True, True]):
        arguments = (out, query, key, value, gate, mask, lse, None, needs, impl)
        torch.library.opcheck(
            torch.ops.layalign.gated_cross_attention_backward.default,
            arguments,
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, False])
def test_compiles_into_one_graph_with_gradients(impl: str, dynamic: bool) -> None:
    def both(query, key, value, gate, residual, mask):
        return ops.gated_cross_attention(query, key, value, gate, residual, key_mask=mask, impl=impl) * 2

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length, source in ((3, 5), (17, 9), (5, 12)) if dynamic else ((3, 5),):
        low = [x.requires_grad_() for x in inputs(2, 4, 2, length, source, 16)]
        mask = make_mask("random", 2, source)
        found, expected = compiled(*low, mask), both(*low, mask)
        torch.testing.assert_close(found, expected)
        weight = torch.randn(found.shape, device=DEVICE)
        for a, b in zip(
            torch.autograd.grad(found, low, weight), torch.autograd.grad(expected, low, weight), strict=True
        ):
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*low, mask), both(*low, mask))


def test_a_second_derivative_raises(impl: str) -> None:
    low = [x.requires_grad_() for x in inputs(1, 2, 1, 3, 4, 16)]
    gradients = torch.autograd.grad(ops.gated_cross_attention(*low, impl=impl).square().sum(), low, create_graph=True)
    with pytest.raises(BackendError, match="no second derivative; use impl='torch'"):
        gradients[0].sum().backward()


def test_gradients_are_the_same_whoever_looks(impl: str) -> None:
    leaves = [x.requires_grad_() for x in inputs(2, 4, 2, 20, 5, 16)]
    mask = make_mask("random", 2, 5)

    def called() -> Tensor:
        return ops.gated_cross_attention(*leaves, key_mask=mask, impl=impl)

    weight = torch.randn(called().shape, device=DEVICE)
    right = torch.autograd.grad(called(), leaves, weight)

    def same(result: Tensor, grad: Tensor = weight) -> None:
        for one, other in zip(torch.autograd.grad(result, leaves, grad), right, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)

    same(called(), weight.transpose(0, 1).contiguous().transpose(0, 1))  # in pieces
    same(called(), torch._neg_view(-weight))
    with torch.autograd.graph.save_on_cpu():  # changes their layout
        result = called()
    same(result)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        same(called())
    assert "layalign::gated_cross_attention_backward" in {event.key for event in profiled.key_averages()}
    nothing = torch.autograd.grad(called()[:0].sum(), leaves)
    assert all(not gradient.any() for gradient in nothing)


def test_saved_tensors_are_unpacked_once(impl: str) -> None:
    """Checkpoints refuse a second time."""
    leaves = [x.requires_grad_() for x in inputs(2, 4, 2, 20, 5, 16)]
    unpacked: list[int] = []
    for watching in (contextlib.nullcontext(), torch.profiler.profile()):
        unpacked.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: unpacked.append(1) or t):
            result = ops.gated_cross_attention(*leaves, key_mask=make_mask("random", 2, 5), impl=impl)
        with watching:
            torch.autograd.grad(result.sum(), leaves)
        assert len(unpacked) == 6, watching  # query, key, value, gate, mask and the log-sum-exp


def test_autocast_takes_its_type_and_key_may_have_another_one(impl: str) -> None:
    def attend(*args) -> Tensor:
        return ops.gated_cross_attention(*args, impl=impl)

    query, key, value, gate, residual = (x.requires_grad_() for x in inputs(2, 4, 2, 17, 5, 16))
    with torch.autocast(DEVICE, dtype=torch.float16):
        out = attend(query, key, value, gate, residual)
    assert out.dtype == torch.float16
    out.float().square().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in (query, key, value, gate, residual))
    halves = [x.detach().half() for x in (query, key, value)]
    expected = attend(*halves, gate.detach(), residual.detach())
    assert torch.equal(out.detach(), expected)
    mixed = attend(halves[0], key.detach().double(), value.detach(), gate.detach(), residual.detach())
    assert torch.equal(mixed, expected)


@pytest.mark.slow
def test_importing_the_operations_needs_neither_kernels_nor_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from layalign import ops;"
        "ops.gated_cross_attention(*(torch.ones(1, 1, 2, 3) for _ in 'qkv'), torch.ones(1));"
        "print([name for name in sys.modules if name.startswith('layalign_kernels')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
@with_torch
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1, 16), (2, 4, 2, 5, 63, 59), (1, 6, 3, 97, 97, 64), (3, 8, 1, 2, 5, 80)]
)
def test_result_within_the_error_budget(impl: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    skip_unserved(impl, dtype)
    low = attention_inputs(*shape, dtype=dtype)
    mask = torch.rand(shape[0], shape[4], generator=torch.Generator().manual_seed(1)) > 0.3
    mask = mask.to(DEVICE)
    exact = reference.gated_cross_attention(*(tensor.double() for tensor in low), key_mask=mask)
    plain = reference.gated_cross_attention(*low, key_mask=mask)
    within_budget(ops.gated_cross_attention(*low, key_mask=mask, impl=impl), plain, exact, dtype)


def test_gradients_of_plain_torch_equal_finite_differences() -> None:
    tensors = [tensor.requires_grad_() for tensor in attention_inputs(b=2, t=2, s=3, d=4)]
    mask = torch.tensor([[True, False, True], [False, False, False]], device=DEVICE)
    function = lambda *a: ops.gated_cross_attention(*a, key_mask=mask, impl="torch")  # noqa: E731
    assert torch.autograd.gradcheck(function, tensors)


@with_torch
def test_masked_tokens_are_not_read(impl: str) -> None:
    query, key, value, gate, residual = attention_inputs(dtype=torch.float32)
    mask = torch.tensor([[True] * 7, [True] * 3 + [False] * 4], device=DEVICE)
    expected = ops.gated_cross_attention(query, key, value, gate, residual, key_mask=mask)
    strided = query.transpose(1, 2).contiguous().transpose(1, 2)  # as transformers hands it over
    key, value = key.clone(), value.clone()
    key[1, :, 3:], value[1, :, 3:] = torch.nan, torch.nan
    found = ops.gated_cross_attention(strided, key, value, gate, residual, key_mask=mask, impl=impl)
    torch.testing.assert_close(found, expected)


@with_torch
def test_a_fully_masked_source_gives_base_and_finite_gradients(impl: str) -> None:
    inputs = [tensor.float().requires_grad_() for tensor in attention_inputs(b=1)]
    out = ops.gated_cross_attention(*inputs, key_mask=torch.zeros(1, 7, dtype=torch.bool, device=DEVICE), impl=impl)
    assert torch.equal(out, inputs[4])
    out.sum().backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in inputs)
    assert inputs[0].grad.abs().sum() == 0


def test_scale_is_used() -> None:
    query, key, value, gate, residual = attention_inputs()
    doubled = ops.gated_cross_attention(2 * query, key, value, gate, residual)
    torch.testing.assert_close(ops.gated_cross_attention(query, key, value, gate, residual, scale=2 * 6**-0.5), doubled)


@pytest.mark.slow
@with_torch
def test_compiles_into_one_graph_with_dynamic_source_length(impl: str) -> None:
    pytest.importorskip("torch._dynamo")
    attend = functools.partial(ops.gated_cross_attention, impl=impl)
    compiled = torch.compile(lambda *a: attend(*a), fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9, 12):
        tensors = attention_inputs(s=length, dtype=torch.float32)
        torch.testing.assert_close(compiled(*tensors), attend(*tensors))
