"""The layer mix, forward and backward, over every backend that has some kernels here, and plain torch.

Without a GPU that is Triton's interpreter, the C++ kernels where the extension is built, and the CUDA kernels'
emulation where LAYALIGN_EMULATE_CUDA names it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import (
    DEVICE,
    DTYPES,
    MIX_SHAPES,
    doubled,
    mix_arguments,
    mix_gradients,
    mix_inputs,
    same_values,
    serving,
    skip_unserved,
    within_budget,
)

from layalign import ArgumentError, BackendError, ops, reference
from layalign.ops import backends, checks

every_backend = pytest.mark.parametrize("impl", [name for name in serving("layer_mix") if name != "torch"])


def launchers(impl: str):
    """(forward, backward) of the layer mix, below the operation."""
    return tuple(backends.launcher(impl, f"layer_mix_{way}") for way in ("forward", "backward"))


@pytest.mark.slow
@pytest.mark.parametrize("impl", serving("layer_mix"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2, 1, 1, 1), (5, 6, 2, 7, 11), (33, 4, 1, 63, 59), (64, 6, 2, 97, 8)])
def test_result_within_the_error_budget(impl: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    skip_unserved(impl, dtype)
    low = mix_inputs(*shape, dtype=dtype)[:3]
    exact = reference.layer_mix(*doubled(low))
    within_budget(ops.layer_mix(*low, impl=impl), reference.layer_mix(*low), exact, dtype)


@pytest.mark.slow
@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MIX_SHAPES)
def test_gradients_within_the_error_budget(impl: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    skip_unserved(impl, dtype)
    arguments = mix_arguments(shape, dtype)[:3]
    exact = mix_gradients(reference.layer_mix, same_values(arguments, torch.float64))
    plain = mix_gradients(reference.layer_mix, same_values(arguments, dtype))
    found = mix_gradients(functools.partial(ops.layer_mix, impl=impl), arguments)
    for ours, usual, true in zip(found, plain, exact, strict=True):
        assert ours.shape == true.shape
        within_budget(ours, usual, true, dtype)


@every_backend
def test_only_what_is_needed_is_computed(impl: str) -> None:
    hidden, w1, b1, *_ = (
        x if isinstance(x, list) else x.detach() for x in mix_arguments((3, 4, 1, 3, 8), torch.float32)
    )
    hidden = [layer.detach() for layer in hidden]
    layer_mix_forward, layer_mix_backward = launchers(impl)
    x = layer_mix_forward(hidden, w1, b1)
    assert layer_mix_backward(x, x, hidden, w1, True, False)[2] is None
    weight_grad, bias_grad, hidden_grad = layer_mix_backward(x, x, hidden, w1, False, True)
    assert weight_grad is None and bias_grad is None and hidden_grad.shape == (3, 1, 3, 8)


@pytest.mark.slow
@every_backend
def test_backward_is_bit_equal_twice(impl: str) -> None:
    arguments = mix_arguments((9, 10, 2, 21, 33), torch.float32)[:3]
    ours = functools.partial(ops.layer_mix, impl=impl)
    for first, second in zip(mix_gradients(ours, arguments), mix_gradients(ours, arguments), strict=True):
        assert torch.equal(first, second)


@every_backend
def test_poisoned_outputs_are_overwritten(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, w1, b1, *_ = mix_arguments((5, 6, 2, 7, 11), torch.float32)
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


ROWS = (1, 2, 5, 6, 9, 13)


def chosen_tokens(function: Callable[..., Any], hidden: list[torch.Tensor], *rest: torch.Tensor) -> list[torch.Tensor]:
    """The result of a function of the layers and its gradients; all but the chosen tokens are NaN."""
    poison = torch.full((14, 1), torch.nan, device=DEVICE).index_fill(0, torch.tensor(ROWS, device=DEVICE), 0.0)
    leaves = [(h.detach() + poison.view(2, 7, 1)).requires_grad_() for h in hidden]
    rest = tuple(each.detach().requires_grad_() for each in rest)
    found = function(leaves, *rest)
    weights = torch.arange(1.0, found.numel() + 1, device=DEVICE).cos().view_as(found)
    return [found.detach(), *torch.autograd.grad((found * weights).sum(), (*leaves, *rest))]


@pytest.mark.parametrize("impl", serving("layer_mix"))
def test_only_the_rows_asked_for_are_read(impl: str) -> None:
    arguments, rows = mix_inputs(5, 6, 2, 7, 11, dtype=torch.float32)[:3], torch.tensor(ROWS, device=DEVICE)
    found = chosen_tokens(lambda *given: ops.layer_mix(*given, rows=rows, impl=impl), *arguments)
    copied = lambda hidden, *rest: reference.layer_mix(checks.select_rows(hidden, rows), *rest)  # noqa: E731
    for one, other in zip(found, chosen_tokens(copied, *arguments), strict=True):
        torch.testing.assert_close(one, other)


def test_triton_reads_rows_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias = mix_inputs(5, 6, 2, 7, 11, dtype=torch.float32)[:3]
    monkeypatch.setattr(checks, "select_rows", None)
    found = ops.layer_mix(hidden, weight, bias, rows=torch.tensor(ROWS, device=DEVICE), impl="triton")
    assert found.shape == (6, 1, len(ROWS), 11)


@pytest.mark.parametrize("rows", [[1, 2], torch.ones(14, dtype=torch.bool), torch.tensor([[1]]), torch.tensor([0.0])])
def test_rows_that_are_no_positions_are_named(rows: Any) -> None:
    hidden, weight, bias = mix_inputs(5, 6, 2, 7, 11, dtype=torch.float32)[:3]
    rows = rows.to(DEVICE) if isinstance(rows, torch.Tensor) else rows
    with pytest.raises(ArgumentError, match=r"rows: expected int64 positions \(N,\), got"):
        ops.layer_mix(hidden, weight, bias, rows=rows)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU asserts it, and is lost then")
@pytest.mark.parametrize(
    "impl, compiled", [*((impl, False) for impl in serving("layer_mix")), ("triton", True)]
)  # compiled, the others select by torch's own index_select
def test_rows_elsewhere_or_twice_are_named(impl: str, compiled: bool) -> None:
    hidden, weight, bias = mix_inputs(5, 6, 2, 7, 11, dtype=torch.float32)[:3]
    hidden, w2 = [h.detach() for h in hidden], torch.ones(3, 11)
    graph = torch.compile if compiled else lambda function, **_: function
    for rows in ([1, 14], [-1, 3], [2, 2], [5, 3]):
        for operation, rest in ((ops.layer_mix, ()), (ops.layer_projection, (w2,))):
            call = graph(functools.partial(operation, impl=impl), backend="eager", fullgraph=True)
            with pytest.raises(ArgumentError, match=r"rows: expected ascending positions in the flattened \(B, S\)"):
                call(hidden, weight.detach(), bias.detach(), *rest, rows=torch.tensor(rows))


@pytest.mark.parametrize("impl", serving("layer_mix"))
def test_memory_between_rows_is_not_read(impl: str) -> None:
    hidden, weight, bias, *_ = mix_inputs(dtype=torch.float32)
    wide = [torch.full((2, 14, 22), torch.nan, device=DEVICE) for _ in hidden]
    for place, layer in zip(wide, hidden, strict=True):
        place[:, ::2, :11] = layer
    views = [place[:, ::2, :11] for place in wide]
    assert not views[0].is_contiguous()
    torch.testing.assert_close(ops.layer_mix(views, weight, bias, impl=impl), ops.layer_mix(hidden, weight, bias))


@every_backend
def test_layers_may_have_different_strides(impl: str) -> None:
    hidden, w1, b1, *_ = mix_arguments((4, 6, 2, 7, 12), torch.float32)
    with torch.no_grad():
        wide = torch.full((2, 9, 24), torch.nan, device=DEVICE)
        wide[:, 1:8, 5:17] = hidden[0]
        transposed = hidden[1].transpose(0, 1).contiguous().transpose(0, 1)
        last = hidden[2].transpose(1, 2).contiguous().transpose(1, 2)  # no unit last stride
        views = [wide[:, 1:8, 5:17], transposed, last, hidden[3]]
        for shift in range(4):  # each kind of view comes first once: the first layer decides the layout
            moved = views[shift:] + views[:shift]
            weight = torch.cat([w1[:, shift:], w1[:, :shift]], dim=1)
            found = ops.layer_mix(moved, weight, b1, impl=impl)
            torch.testing.assert_close(found, reference.layer_mix(hidden, w1, b1))


@pytest.mark.slow
@every_backend
def test_operators_pass_opcheck(impl: str) -> None:
    hidden, w1, b1, *_ = mix_arguments((3, 4, 2, 5, 16), torch.float32)
    torch.library.opcheck(torch.ops.layalign.layer_mix, (hidden, w1, b1, impl))
    torch.library.opcheck(torch.ops.layalign.layer_mix, (hidden, w1, None, impl))
    if backends.get(impl).reads_rows:
        rows = torch.tensor([1, 4, 7], device=DEVICE)
        torch.library.opcheck(torch.ops.layalign.layer_mix, (hidden, w1, b1, impl, rows))


@every_backend
def test_a_second_backward_is_refused(impl: str) -> None:
    arguments = mix_arguments((3, 4, 1, 2, 8), torch.float32)[:3]
    out = ops.layer_mix(*arguments, impl=impl).square().sum()
    (first,) = torch.autograd.grad(out, arguments[1], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), arguments[1])


@every_backend
def test_what_the_kernels_do_not_take_is_said(impl: str) -> None:
    hidden, w1, b1, *_ = mix_arguments((3, 4, 1, 2, 8), torch.float64)
    with pytest.raises(BackendError, match="float64 is left to impl='torch'"):
        ops.layer_mix(hidden, w1, b1, impl=impl)
    assert ops.layer_mix(hidden, w1, b1).dtype == torch.float64
    many = [hidden[0].float()] * 65
    with pytest.raises(BackendError, match="at most 64 layers into 256 slots, got 65 and 4"):
        ops.layer_mix(many, torch.zeros(4, 65, device=DEVICE), impl=impl)
