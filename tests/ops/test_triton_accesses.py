"""Triton's kernels read and write elements of their arguments only, and no two programs race, in the interpreter.

What a mask lets through and a later one removes shows in no result, but on a device it may be another tensor's memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from op_cases import make_mask
from torch import Tensor

from layalign import ops
from layalign.ops import backends

pytest.importorskip("triton")

import triton
import triton.language as tl
from watched_triton import watched

IN_INTERPRETER = backends.serves("layer_mix", "triton", "cpu")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not IN_INTERPRETER[0], reason=IN_INTERPRETER[1])]
ATTENTION = [  # B, H, G, T, S, d, mask, layout, type
    (2, 4, 2, 5, 7, 6, "random", "packed", torch.float32),
    (1, 4, 2, 17, 37, 59, "right", "gaps", torch.float16),
    (2, 4, 4, 1, 70, 64, None, "tokens first", torch.float32),
    (1, 2, 1, 3, 5, 160, "left", "packed", torch.float16),
    (2, 2, 2, 35, 33, 16, "row", "gaps", torch.float16),
]
MIX = [  # E, J, B, S, D, layout, type
    (1, 2, 1, 1, 1, "packed", torch.float32),
    (5, 6, 2, 7, 11, "tokens first", torch.float16),
    (33, 4, 1, 5, 59, "gaps", torch.float32),
    (3, 130, 1, 2, 40, "packed", torch.float16),
]


@functools.cache
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def draw(*shape: int, layout: str = "packed", dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers; "gaps": elements between rows and before the first, "tokens first": dimensions -2, -3 swapped."""
    numbers = torch.randn(shape, generator=generator()).to(dtype)
    if layout == "gaps":
        numbers = torch.nn.functional.pad(numbers, (1, 2), value=torch.nan)[..., 1:-2]
    if layout == "tokens first":
        numbers = numbers.transpose(-2, -3).contiguous().transpose(-2, -3)
    return numbers.requires_grad_()


def accesses(call: Callable[[], Tensor]) -> list[str]:
    """Run a call, backward too where it can; returns the kernels that ran."""
    with watched() as watch:
        result = call()
        if result.requires_grad:
            result.float().square().sum().backward()
    assert not watch.problems
    return watch.kernels[1:]


@pytest.mark.parametrize("b, h, g, t, s, d, kind, layout, dtype", ATTENTION)
def test_attention(b, h, g, t, s, d, kind, layout, dtype) -> None:
    query = draw(b, h, t, d, layout=layout, dtype=dtype)
    key, value = (draw(b, g, s, d, layout=layout, dtype=dtype) for _ in range(2))
    mask = None if kind is None else make_mask(kind, b, s)
    gate, residual = draw(1), draw(b, t, h, d, dtype=dtype)
    call = functools.partial(ops.gated_cross_attention, query, key, value, gate, residual, key_mask=mask, impl="triton")
    assert len(accesses(call)) == 3
    decode = backends.launcher("triton", "gated_cross_attention_decode")
    with torch.no_grad():
        for splits in (1, 3):
            inputs = query, key, value, gate, residual, mask, None
            assert len(accesses(lambda inputs=inputs, splits=splits: decode(*inputs, splits=splits))) == min(splits, 2)


@pytest.mark.parametrize("e, j, b, s, d, layout, dtype", MIX)
def test_layers(e, j, b, s, d, layout, dtype) -> None:
    hidden = [draw(b, s, d, layout=layout, dtype=dtype) for _ in range(e)]
    weight, bias, w2, b2 = draw(j, e), draw(j), draw(13, d, dtype=dtype), draw(13, dtype=dtype)
    assert len(accesses(lambda: ops.layer_mix(hidden, weight, bias, impl="triton"))) == 3
    with torch.no_grad():
        assert accesses(lambda: ops.layer_projection(hidden, weight, bias, w2, b2, impl="triton"))


@triton.jit
def faulty_kernel(p_x, p_y, size, FAULT: tl.constexpr):
    i_program, o_n = tl.program_id(0), tl.arange(0, 16)
    bound = size + 1 if FAULT == "mask" else size
    b_x = tl.load(p_x + o_n, mask=o_n < bound, other=0.0)
    o_y = o_n if FAULT == "race" else i_program * size + o_n
    tl.store(p_y + o_y, b_x, mask=o_n < size)


@pytest.mark.parametrize("fault, problem", [("none", ""), ("mask", "a load outside"), ("race", "two programs write")])
def test_faults_are_seen(fault: str, problem: str) -> None:
    x, y = torch.randn(20)[:11], torch.empty(22)
    with watched() as watch:
        faulty_kernel[(2,)](x, y, 11, FAULT=fault)
    assert watch.kernels[1:] == ["faulty_kernel"]
    assert bool(watch.problems) == bool(problem) and all(problem in one for one in watch.problems)
    with watched() as watch:
        faulty_kernel[(2,)](y, y, 11, FAULT="none")
    assert watch.problems == ["faulty_kernel: a program reads what another one writes"]
