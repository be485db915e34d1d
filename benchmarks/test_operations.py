"""The operations with every usable backend, against reference.py, torch's attentions and the ceilings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import measure
import operations
import pytest
import torch
from operations import FLEX, Operation
from shapes import Shapes, chosen

from layalign.ops import backends

pytestmark = pytest.mark.timeout(600)

SHAPES = chosen()
IMPLS = [name for name in backends.names() if name != "torch"]  # "torch" is the baseline reference.py


def serving(operation: str, impl: str, device: str) -> None:
    """Skip, with the reason, if the backend cannot run here or only in a debug mode."""
    if device == "cpu" and impl in ("triton", "cuda"):
        pytest.skip(f"{impl}: needs a GPU (interpreted or emulated it is not worth timing)")
    usable, reason = backends.serves(operation, impl, device)
    if not usable:
        pytest.skip(f"{impl}: {reason}")


def require_right(operation: Operation, impl: str, shapes: Shapes) -> None:
    """Check the result, with and without gradients enabled, and every gradient; a wrong backend is not timed.

    In float32 they must agree with reference.py. In narrower types they must agree with reference.py in float32 on the
    same numbers, within three times the error of reference.py in that type.
    """
    exact = [leaf.detach().float().requires_grad_() for leaf in operation.leaves]
    grad = torch.randn_like(operation.plain(*exact)).to(shapes.dtype)

    def outcome(call: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> list[torch.Tensor]:
        with torch.no_grad():  # other kernels run without gradients
            alone = call()
        result = call()
        return [alone, result, *torch.autograd.grad(result, leaves, grad.to(result.dtype))]

    right = outcome(lambda: operation.plain(*exact), exact)
    plain = outcome(lambda: operation.plain(*operation.leaves), operation.leaves)
    # Of results, and of gradients: that of the gate is one sum with much cancellation.
    floors = (1e-4, 3e-4) if shapes.dtype == torch.float32 else (2**-8, 3e-2)
    errors = [measure.difference(one, other) for one, other in zip(plain, right, strict=True)]
    allowed = [max(floors[place > 1], 3 * error) for place, error in enumerate(errors)]
    whats = ["result without gradients", "result", *(f"gradient of {tuple(leaf.shape)}" for leaf in exact)]
    assert all(map(math.isfinite, errors)), f"{operation.name}, {operations.REFERENCE}: not finite; not timed"
    calls: dict[str, Callable[[], torch.Tensor]] = {**operation.baselines, impl: lambda: operation.call(impl)}
    del calls[operations.REFERENCE]  # has just been run, and set the bounds
    for name, call in calls.items():
        found = outcome(call, operation.leaves)
        for what, one, other, most in zip(whats, found, right, allowed, strict=True):
            error = measure.difference(one, other)
            text = f"{what} wrong by {error:.1e} (relative), allowed {most:.0e}"
            assert error <= most, f"{operation.name}, {name}: {text}; not timed"


def timed(operation: Operation, impl: str, backward: bool, rows: Any, shapes: Shapes, group: str, name: str) -> None:
    """Check an operation, then time it."""
    require_right(operation, impl, shapes)
    with torch.set_grad_enabled(backward):
        labels = {**operation.labels, "impl": impl, "auto": operation.auto()}
    calls = operation.passes(impl, backward)
    least = {"moved": operation.moved[backward], "flop": operation.flop[backward]}
    rows.time(group, f"{name} {impl}", calls, labels, **least)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES.mix, ids=lambda shape: f"B{shape[0]}-S{shape[1]}")
@pytest.mark.parametrize("name", ["layer_mix", "layer_projection"])
def test_layers(
    name: str, shape: tuple[int, int], impl: str, backward: bool, rows: Any, benchmark: Any, shapes: Shapes
) -> None:
    serving(name, impl, shapes.device)
    operation = operations.layers(name, *shape, shapes.mix_sizes, shapes.device, shapes.dtype)
    group = f"{name}, forward and backward" if backward else name
    timed(operation, impl, backward, rows, shapes, group, f"B{shape[0]} S{shape[1]}")


# One query per sequence (T 1) is a decoding step, which has no backward.
PASSES = [(shape, backward) for shape in SHAPES.attention for backward in ((False, True) if shape[1] > 1 else (False,))]


def pass_id(value: tuple[int, int, int] | bool) -> str:
    """B2-T512-S64, or which passes."""
    return "B{}-T{}-S{}".format(*value) if isinstance(value, tuple) else "both" if value else "forward"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("grouped", [False, True], ids=["mha", "gqa"])
@pytest.mark.parametrize(("shape", "backward"), PASSES, ids=pass_id)
def test_attention(
    shape: tuple[int, int, int], backward: bool, grouped: bool, impl: str, rows: Any, benchmark: Any, shapes: Shapes
) -> None:
    batch, length, source = shape
    serving("gated_cross_attention", impl, shapes.device)
    heads, size = shapes.attention_heads
    groups = heads // 4 if grouped else heads
    operation = operations.attention(batch, length, source, heads, groups, size, shapes.device, shapes.dtype)
    if shapes.device == "cuda":
        try:
            operation.baselines[FLEX] = operations.flex(operation)
        except Exception as error:  # a baseline that torch cannot compile here is not a failure
            rows.note(FLEX, f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}")
    else:
        rows.note(FLEX, "not compared on a CPU: torch compiles it for a GPU")
    kind = "decode" if length == 1 else "forward and backward" if backward else "forward"
    name = f"B{batch} T{length} S{source} H{heads}/{groups}"
    timed(operation, impl, backward, rows, shapes, f"gated_cross_attention, {kind}", name)
