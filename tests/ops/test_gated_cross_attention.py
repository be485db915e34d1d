"""Gated cross-attention as an operation, over every backend with kernels here: schema, compile, autocast, gradient."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from op_cases import BACKENDS, DEVICE, inputs, make_mask
from torch import Tensor

from layalign import BackendError, ops


@pytest.fixture(params=BACKENDS)
def impl(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(impl: str, masked: bool) -> None:
    low = inputs(2, 4, 2, 3, 5, 16)
    mask = make_mask("random", 2, 5) if masked else None
    leaves = [x.requires_grad_() for x in low]
    base = leaves[4] if masked else None
    torch.library.opcheck(torch.ops.layalign.gated_cross_attention.default, (*leaves[:4], base, mask, None, impl))
    detached = [x.detach() for x in low]
    few = (*detached[:4], detached[4] if masked else None, mask, 0.3, impl)
    torch.library.opcheck(torch.ops.layalign.gated_decode.default, few)
    query, key, value, gate, _ = detached
    out, lse = torch.ops.layalign.gated_cross_attention(query, key, value, gate, None, mask, None, impl)
    for needs in ([True] * 4, [False, True, False, False], [False, False, True, True]):
        arguments = (out, query, key, value, gate, mask, lse, None, needs, impl)
        torch.library.opcheck(
            torch.ops.layalign.gated_cross_attention_backward.default,
            arguments,
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("dynamic", [True, False])
def test_compiles_into_one_graph_with_gradients(impl: str, dynamic: bool) -> None:
    def both(query, key, value, gate, base, mask):
        return ops.gated_cross_attention(query, key, value, gate, base, key_mask=mask, impl=impl) * 2

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


def test_autocast_takes_its_type_and_key_may_have_another_one(impl: str) -> None:
    def attend(*args) -> Tensor:
        return ops.gated_cross_attention(*args, impl=impl)

    query, key, value, gate, base = (x.requires_grad_() for x in inputs(2, 4, 2, 17, 5, 16))
    with torch.autocast(DEVICE, dtype=torch.float16):
        out = attend(query, key, value, gate, base)
    assert out.dtype == torch.float16
    out.float().square().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in (query, key, value, gate, base))
    halves = [x.detach().half() for x in (query, key, value)]
    expected = attend(*halves, gate.detach(), base.detach())
    assert torch.equal(out.detach(), expected)
    mixed = attend(halves[0], key.detach().double(), value.detach(), gate.detach(), base.detach())
    assert torch.equal(mixed, expected)


def test_importing_the_operations_needs_neither_kernels_nor_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from layalign import ops;"
        "ops.gated_cross_attention(*(torch.ones(1, 1, 2, 3) for _ in 'qkv'), torch.ones(1));"
        "print([name for name in sys.modules if name.startswith('layalign_kernels')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
