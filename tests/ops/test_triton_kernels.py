"""What only the Triton kernels have: chosen splits, 64-bit offsets."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch
from op_cases import DEVICE, inputs, make_mask, poison

pytest.importorskip("triton")

import triton
import triton.language as tl
from layalign_kernels import (
    gated_cross_attention,
    gated_cross_attention_backward,
    gated_cross_attention_common,
    gated_cross_attention_decode,
)
from layalign_kernels.common import next_power_of_2, offset64
from layalign_kernels.gated_cross_attention_backward import splits_over_rows
from layalign_kernels.gated_cross_attention_decode import splits_over_source

from layalign import reference

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_backward_is_deterministic_and_independent_of_the_split() -> None:
    query, key, value, gate, _ = inputs(2, 4, 2, 75, 21, 16)
    mask = make_mask("random", 2, 21)
    grad = torch.randn(2, 75, 4, 16, device=DEVICE)
    _, lse = gated_cross_attention.gated_cross_attention_forward(query, key, value, gate, None, mask, None)
    backward = gated_cross_attention_backward.gated_cross_attention_backward
    runs = [backward(grad, query, key, value, gate, mask, lse, None, splits=splits) for splits in (1, 1, 3, 3)]
    for first, second in ((0, 1), (2, 3)):
        assert all(torch.equal(a, b) for a, b in zip(runs[first], runs[second], strict=True))
    for whole, split in zip(runs[0], runs[2], strict=True):
        torch.testing.assert_close(whole, split, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "size", "kind"),
    [(1, 64, "none"), (21, 64, "random"), (64, 128, "row"), (65, 64, "left"), (128, 128, "none")],
)
@pytest.mark.parametrize("splits", [1, 3])
def test_a_source_kept_in_one_program_and_one_in_blocks(
    splits: int, source: int, size: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two forms of the backward, against float64: each rounds products to half precision."""
    dtype = torch.float16
    query, key, value, gate, _ = inputs(2, 4, 2, 43, source, size, dtype=dtype)
    mask = make_mask(kind, 2, source)
    grad = torch.randn(2, 43, 4, size, generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype)
    leaves = [x.detach().double().requires_grad_() for x in (query, key, value, gate)]
    out = reference.gated_cross_attention(*leaves, torch.zeros_like(grad, dtype=torch.float64), key_mask=mask)
    exact = torch.autograd.grad(out, leaves, grad.double())
    _, lse = gated_cross_attention.gated_cross_attention_forward(query, key, value, gate, None, mask, None)
    key, value = poison(key, mask), poison(value, mask)
    module = gated_cross_attention_backward
    assert module.resident_configuration(size, source, dtype, "sm_90") is not None
    for table in (module.RESIDENT, {}):
        monkeypatch.setattr(module, "RESIDENT", table)
        found = module.gated_cross_attention_backward(grad, query, key, value, gate, mask, lse, None, splits=splits)
        for one, wanted in zip(found, exact, strict=True):
            assert (one.double() - wanted).norm() <= 2e-3 * wanted.norm() + 1e-6
        for needs in ((True, False, False, False), (False, True, False, True), (False, False, True, False)):
            part = module.gated_cross_attention_backward(grad, query, key, value, gate, mask, lse, None, needs, splits)
            for one, whole, need in zip(part, found, needs, strict=True):
                assert (one is None and not need) or torch.equal(one, whole)


def test_splits_fill_the_device_and_leave_no_program_idle() -> None:
    assert splits_over_source(programs=32, source=4096, block=64, room=396) == 11
    assert splits_over_source(programs=256, source=4096, block=64, room=396) == 1  # not a second wave
    assert splits_over_source(programs=1000, source=4096, block=64, room=396) == 1
    assert splits_over_source(programs=1, source=100, block=64, room=396) == 1
    assert splits_over_source(programs=8, source=0, block=64, room=396) == 1
    assert splits_over_rows(programs=1000, blocks=64, processors=132) == 1
    assert splits_over_rows(programs=32, blocks=64, processors=132) == 8
    assert splits_over_rows(programs=1, blocks=3, processors=132) == 1
    for blocks in range(1, 70):  # no program without work
        splits = splits_over_source(programs=9, source=blocks, block=1, room=130)
        assert (splits - 1) * -(-blocks // splits) < blocks
        splits = splits_over_rows(programs=3, blocks=blocks, processors=20)
        assert (splits - 1) * -(-blocks // splits) < blocks


@triton.jit
def far_offset(p_out, index, stride, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(p_out + o, offset64(index + o, stride))


def test_offsets_past_32_bits() -> None:
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    far_offset[(1,)](p_out=out, index=3, stride=2**30, BLOCK=4)
    assert out.tolist() == [(3 + i) * 2**30 for i in range(4)]


def test_every_stride_is_multiplied_in_64_bits() -> None:
    modules = (
        gated_cross_attention,
        gated_cross_attention_backward,
        gated_cross_attention_common,
        gated_cross_attention_decode,
    )
    multiplied = 0
    for module in modules:
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                names = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
                assert not any(name.startswith("stride_") for name in names), ast.unparse(node)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "offset64":
                multiplied += 1
    assert multiplied > 50


def unguarded_launches(source: str) -> list[str]:
    """The ``kernel[grid](...)`` of a file that no ``with torch.cuda.device...`` encloses, outside kernels."""
    found: list[str] = []

    def visit(node: ast.AST, guarded: bool) -> None:
        if isinstance(node, ast.FunctionDef):
            if any(ast.unparse(each).startswith("triton.jit") for each in node.decorator_list):
                return
            guarded = False  # it may run after the block
        if isinstance(node, ast.With):
            guarded |= any(ast.unparse(item.context_expr).startswith("torch.cuda.device") for item in node.items)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and not guarded:
            found.append(ast.unparse(node.func))
        for child in ast.iter_child_nodes(node):
            visit(child, guarded)

    visit(ast.parse(source), False)
    return found


def test_no_kernel_is_launched_without_a_device_guard() -> None:
    """With tensors on a device that is not the current one, it would read another device's memory, or race."""
    guards = 0
    for file in (ROOT / "kernels").glob("*.py"):
        source = file.read_text(encoding="utf-8")
        assert not unguarded_launches(source), file
        for line in re.findall(r"^ *with torch\.cuda\.device.*:$", source, re.MULTILINE):
            open_ = source.replace(line, line[: len(line) - len(line.lstrip())] + "if True:", 1)
            guards += len(unguarded_launches(open_))
    assert guards, "the check finds no launch whose guard was removed"


def test_powers_of_two() -> None:
    assert [next_power_of_2(n) for n in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]
