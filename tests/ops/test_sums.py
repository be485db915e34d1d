"""Sums in half precision: fp32 inside and rounded once, however many slots, rows and groups they run over."""

from __future__ import annotations

import pytest
import torch
from op_cases import DEVICE, Recorded, serving, skip_unserved
from torch import Tensor, nn

from layalign import ops, reference
from layalign.modeling import key_values
from layalign.nn.aligner import WeightedLinearProjector
from layalign.ops import grouped_projection

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
B, S, D, E, J, N, M = 2, 6, 16, 3, 160, 24, 8


@pytest.fixture(autouse=True)
def _the_same_maps_in_any_order_of_tests() -> None:
    torch.manual_seed(0)


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def assert_rounded_once(names: str, found: tuple[Tensor, ...], exact: tuple[Tensor, ...], times: float = 2.0) -> None:
    """Within ``times`` the error of the exact result in its dtype: the states in between are rounded too."""
    for name, one, two in zip(names.split(), found, exact, strict=True):
        assert relative(one, two) <= times * relative(two.to(one.dtype), two), name


def inputs(dtype: torch.dtype, lead: tuple[int, ...] = ()) -> list[Tensor]:
    """mix weight and bias, weight and bias, E layers"""
    own = (J, E), (J,), (*lead, N, D), (*lead, N)
    return [draw(*shape, seed=i, dtype=dtype) for i, shape in enumerate((*own, *[(B, S, D)] * E))]


def exact_gradients(tensors: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(reference.layer_projection(wide[4:], *wide[:4]), wide, grad.double())


@pytest.mark.slow
@HALVES
@pytest.mark.parametrize("lead", [(), (J,)], ids=["shared", "per slot"])
@pytest.mark.parametrize("impl", serving("layer_projection"))
def test_layer_projection_rounds_each_sum_once(impl: str, lead: tuple[int, ...], dtype: torch.dtype) -> None:
    skip_unserved(impl, dtype)
    tensors, grad = inputs(dtype, lead), draw(J, B, S, N, seed=9, dtype=dtype)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    found = torch.autograd.grad(ops.layer_projection(leaves[4:], *leaves[:4], impl=impl), leaves, grad)
    names, exact = "mix_weight mix_bias weight bias h0 h1 h2", exact_gradients(tensors, grad)
    if impl == "torch":  # plain torch rounds the mix before its bias and relu, which is no sum: other gates of the relu
        names, found, exact = "weight bias", found[2:4], exact[2:4]
    assert_rounded_once(names, found, exact)


@pytest.mark.slow
@pytest.mark.skipif("cpp" not in serving("layer_mix"), reason="the C++ kernels are not there")
@HALVES
@pytest.mark.parametrize("way", ["one step", "two steps", "folded"])
def test_grouped_projection_rounds_each_sum_once(way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Group by group: 40 groups of four slots each."""
    monkeypatch.setattr(grouped_projection, "GROUP_BYTES", 4 * B * S * D * 2)
    mix_weight, mix_bias, weight, bias, *hidden = (tensor.cpu() for tensor in inputs(dtype))
    projector = WeightedLinearProjector.__new__(WeightedLinearProjector)
    nn.Module.__init__(projector)
    projector.impl, projector.structure, projector.times = "cpp", "Linear", 1
    projector.fc1, projector.fc2 = nn.Linear(E, J), nn.Linear(D, N)
    for linear, *own in ((projector.fc1, mix_weight, mix_bias), (projector.fc2, weight, bias)):
        linear.weight, linear.bias = map(nn.Parameter, own)
    hidden = [layer.requires_grad_() for layer in hidden]
    maps = [nn.Linear(N, M, bias=False).to(dtype).requires_grad_(False) for _ in range(J)]
    grad = draw(J, B, S, N if way == "one step" else M, seed=9, dtype=dtype).cpu()
    folded = None
    if way == "folded":
        folded = (
            torch.stack([each.weight @ weight for each in maps]),
            torch.stack([each.weight @ bias for each in maps]),
        )
    found = torch.stack(list(key_values.by_weights(projector, hidden, folded, outer=() if way == "one step" else maps)))
    leaves = [projector.fc1.weight, projector.fc1.bias, projector.fc2.weight, projector.fc2.bias, *hidden]
    back = grad.double()
    if way != "one step":
        back = torch.stack([one.double() @ each.weight.double() for one, each in zip(grad, maps, strict=True)])
    exact = exact_gradients([leaf.detach() for leaf in leaves], back)
    # On the way to these, the states' gradients of every group are rounded, and the folded weights.
    names, gradients = "mix_weight mix_bias weight bias h0 h1 h2", torch.autograd.grad(found, leaves, grad)
    assert_rounded_once(names, gradients, exact, times=2.5)


@HALVES
def test_folding_rounds_each_sum_once(dtype: torch.dtype) -> None:
    """dW2 and db2 from the gradients of 160 folded weights."""
    maps = [nn.Linear(N, M, bias=False).to(DEVICE, dtype).requires_grad_(False) for _ in range(J)]
    inner = nn.Linear(D, N).to(DEVICE, dtype)
    grad, grad_bias = draw(J, M, D, seed=1, dtype=dtype), draw(J, M, seed=2, dtype=dtype)
    made = key_values._fold(inner, maps, dtype, ())
    found = torch.autograd.grad(
        key_values._Fold.apply(inner.weight, inner.bias, made, maps), inner.parameters(), (grad, grad_bias)
    )
    own = torch.stack([each.weight.double() for each in maps])
    exact = (own.mT @ grad.double()).sum(0), (own.mT @ grad_bias.double()[..., None]).sum(0)[:, 0]
    assert_rounded_once("weight bias", found, exact)


@HALVES
@pytest.mark.parametrize("own", [torch.float32, None], ids=["w2-fp32", "w2-half"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_folded_weights_are_products_in_half_precision_rounded_once(
    bias: bool, own: torch.dtype | None, dtype: torch.dtype
) -> None:
    maps = [nn.Linear(256, M, bias=bias).to(DEVICE, dtype) for _ in range(6)]
    inner = nn.Linear(D, 256).to(DEVICE, own or dtype)
    with Recorded() as seen:
        made = key_values._fold(inner, maps, dtype, ())
    assert isinstance(made.weight, Tensor) and made.bias is not None
    ran = zip(seen.names, seen.dtypes, strict=True)
    products = [found for name, found in ran if name in ("aten::mm", "aten::mv", "aten::addmv")]
    assert products == [dtype] * 12
    w2, b2 = inner.weight.double(), inner.bias.double()
    exact = torch.stack([each.weight.double() @ w2 for each in maps])
    exact_bias = torch.stack([each.weight.double() @ b2 + (each.bias.double() if bias else 0) for each in maps])
    assert_rounded_once("weight bias", (made.weight, made.bias), (exact, exact_bias), times=1.02)


@HALVES
@pytest.mark.parametrize("impl", serving("gated_cross_attention"))
def test_the_gates_gradient_is_rounded_once(impl: str, dtype: torch.dtype) -> None:
    skip_unserved(impl, dtype)
    shapes = (2, 4, 40, 16), (2, 4, 9, 16), (2, 4, 9, 16), (1,), (2, 40, 4, 16)
    query, key, value, gate, grad = (draw(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes))
    gate, wide = gate.float().requires_grad_(), gate.double().requires_grad_()
    grad = grad + 1  # so that the sum is no small difference of large numbers
    value = value + 1
    found = torch.autograd.grad(ops.gated_cross_attention(query, key, value, gate, impl=impl), gate, grad)
    out = reference.gated_cross_attention(query.double(), key.double(), value.double(), wide)
    exact = torch.autograd.grad(out, wide, grad.double())
    assert relative(found[0], exact[0]) <= torch.finfo(dtype).eps
