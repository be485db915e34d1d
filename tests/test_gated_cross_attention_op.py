"""Gated cross-attention as an operation: schema, compile, autocast, one derivative; the decode step; 64-bit offsets."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from test_gated_cross_attention import DEVICE, DTYPES, inputs, make_mask, poison
from test_ops import within_budget
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from layalign_kernels import attention_tiles
from layalign_kernels.common import largest_offset, offset64
from layalign_kernels.decode_step import decode_step

from layalign import BackendError, ops, reference


def attend(*args, **options) -> Tensor:
    return ops.gated_cross_attention(*args, impl="triton", **options)


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked: bool) -> None:
    low = inputs(2, 4, 2, 3, 5, 16)
    mask = make_mask("random", 2, 5) if masked else None
    leaves = [x.requires_grad_() for x in low]
    base = leaves[4] if masked else None
    torch.library.opcheck(torch.ops.layalign.gated_cross_attention.default, (*leaves[:4], base, mask, None))
    detached = [x.detach() for x in low]
    few = (*detached[:4], detached[4] if masked else None, mask, 0.3)
    torch.library.opcheck(torch.ops.layalign.gated_decode.default, few)
    query, key, value, gate, _ = detached
    out, lse = torch.ops.layalign.gated_cross_attention(query, key, value, gate, None, mask, None)
    for needs in ([True] * 4, [False, True, False, False], [False, False, True, True]):
        arguments = (out, query, key, value, gate, mask, lse, None, needs)
        torch.library.opcheck(
            torch.ops.layalign.gated_cross_attention_backward.default,
            arguments,
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("dynamic", [True, False])
def test_compiles_into_one_graph_with_gradients(dynamic: bool) -> None:
    def both(query, key, value, gate, base, mask):
        return attend(query, key, value, gate, base, key_mask=mask) * 2

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


def test_a_second_derivative_raises() -> None:
    low = [x.requires_grad_() for x in inputs(1, 2, 1, 3, 4, 16)]
    gradients = torch.autograd.grad(attend(*low).square().sum(), low, create_graph=True)
    with pytest.raises(BackendError, match="no second derivative; use impl='torch'"):
        gradients[0].sum().backward()


def test_autocast_takes_its_type_and_key_may_have_another_one() -> None:
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "bool", "additive", "per head"])
@pytest.mark.parametrize("shape", [(2, 6, 3, 70, 9, 40), (1, 20, 1, 33, 40, 16)])
def test_decode_step_equals_both_attentions(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    b, h, g, cached, s, d = shape
    query, key, value, gate, _ = inputs(b, h, g, 1, s, d, dtype=dtype)
    _, cache_key, cache_value, *_ = inputs(b, h, g, 1, cached, d, dtype=dtype, seed=1)
    mask, keep = make_mask("random", b, s), make_mask("left", b, cached)
    cache_mask: Tensor | None = None
    if kind == "bool":
        cache_mask = keep
    elif kind != "none":
        heads = 1 if kind == "additive" else h
        bias = torch.randn(b, heads, 1, cached, generator=torch.Generator().manual_seed(5)).to(DEVICE)
        cache_mask = bias.masked_fill(~keep[:, None, None], -torch.inf)

    def both(kind_dtype: torch.dtype) -> Tensor:
        q, k, v, ck, cv = (x.to(kind_dtype) for x in (query, key, value, cache_key, cache_value))
        additive = cache_mask
        if kind == "bool":
            additive = torch.zeros(b, 1, 1, cached, device=DEVICE).masked_fill(~keep[:, None, None], -torch.inf)
        scores = q @ ck.repeat_interleave(h // g, 1).transpose(2, 3) * d**-0.5
        scores = scores if additive is None else scores + additive.to(kind_dtype)
        self_out = (scores.softmax(-1) @ cv.repeat_interleave(h // g, 1)).transpose(1, 2)
        return reference.gated_cross_attention(q, k, v, gate.to(kind_dtype), self_out, key_mask=mask)

    hidden = cache_key if kind == "none" else poison(cache_key, keep)
    if kind in ("additive", "per head"):
        hidden = cache_key  # an additive mask does not say what may hold NaN
    found = decode_step(
        query, hidden, cache_value, poison(key, mask), poison(value, mask), gate, cache_mask=cache_mask, key_mask=mask
    )
    within_budget(found, both(dtype), both(torch.float64), dtype)


@triton.jit
def far_offset(p_out, index, stride, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(p_out + o, offset64(index + o, stride))


def test_offsets_past_32_bits() -> None:
    long_cache = torch.empty((64, 32, 65536, 128), device="meta", dtype=torch.float16)
    assert largest_offset(tuple(long_cache.shape), long_cache.stride()) == long_cache.numel() - 1 > 2**31
    view = torch.empty((2, 4, 4096, 128), device="meta").as_strided((2, 4, 4096, 128), (2**33, 128, 2**20, 1))
    assert largest_offset(tuple(view.shape), view.stride()) == 2**33 + 3 * 128 + 4095 * 2**20 + 127
    assert largest_offset((0, 4), (4, 1)) == 3
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    far_offset[(1,)](p_out=out, index=3, stride=2**30, BLOCK=4)
    assert out.tolist() == [(3 + i) * 2**30 for i in range(4)]


def test_every_stride_is_multiplied_in_64_bits() -> None:
    import ast
    import inspect

    from layalign_kernels import decode_step as step
    from layalign_kernels import gated_cross_attention, gated_cross_attention_backward, gated_decode

    modules = (attention_tiles, gated_cross_attention, gated_cross_attention_backward, gated_decode, step)
    multiplied = 0
    for module in modules:
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                names = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
                assert not any(name.startswith("stride_") for name in names), ast.unparse(node)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "offset64":
                multiplied += 1
    assert multiplied > 50


def test_importing_the_operations_needs_neither_kernels_nor_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from layalign import ops;"
        "ops.gated_cross_attention(*(torch.ones(1, 1, 2, 3) for _ in 'qkv'), torch.ones(1));"
        "print([name for name in sys.modules if name.startswith('layalign_kernels')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
