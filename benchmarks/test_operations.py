"""The operations with every usable backend, against reference.py, torch's attentions and the ceilings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import measure
import operations
import pytest
import torch
from operations import FLEX, GEMM, PER_SLOT, REFERENCE, SDPA, VARLEN, Operation
from shapes import Shapes, chosen

from layalign.ops import backends

pytestmark = pytest.mark.timeout(600)

SHAPES = chosen()
IMPLS = [name for name in backends.names() if name != "torch"]  # "torch" is the baseline reference.py


def reason_against(operation: str, impl: str, device: str) -> str:
    """Why a backend cannot run here, or only in a debug mode; "" if it is timed."""
    if device == "cpu" and impl in ("triton", "cuda"):
        return "needs a GPU (interpreted or emulated it is not worth timing)"
    usable, reason = backends.serves(operation, impl, device)
    return "" if usable else reason


def serving(operation: str, impl: str, device: str) -> None:
    """Skip, with the reason, if the backend is not timed here."""
    if reason := reason_against(operation, impl, device):
        pytest.skip(f"{impl}: {reason}")


def require_right(operation: Operation, impl: str, shapes: Shapes, backward: bool = True) -> dict[str, str]:
    """Check the result, with and without gradients enabled, and every gradient; a wrong backend is not timed.

    In float32 they must agree with reference.py. In narrower types they must agree with reference.py in float32 on the
    same numbers, within three times the error of reference.py in that type.

    Args:
        backward: whether the baselines that are not of every run need gradients, too.

    Returns:
        The baselines that cannot run here or are wrong, and why; they are removed. Those of every run must be right.
    """
    with torch.no_grad():
        grad = torch.randn_like(operation.call(impl))
    exact = operation.in_chunks([leaf.detach().float().requires_grad_() for leaf in operation.leaves], grad)
    plain = operation.in_chunks(operation.leaves, grad)
    # Of results, and of gradients: that of the gate is one sum with much cancellation.
    floors = (1e-4, 3e-4) if shapes.dtype == torch.float32 else (2**-8, 3e-2)
    errors = [measure.difference(one, other) for one, other in zip(plain, exact, strict=True)]
    del plain
    allowed = [max(floors[place > 0], 3 * error) for place, error in enumerate(errors)]
    whats = ["result", *(f"gradient of {tuple(leaf.shape)}" for leaf in operation.leaves)]
    assert all(map(math.isfinite, errors)), f"{operation.name}, {REFERENCE}: not finite; not timed"

    def wrong(call: Callable[[], torch.Tensor], both: bool = True) -> str:
        with torch.no_grad():  # other kernels run without gradients
            checked = [("result without gradients", call(), exact[0], allowed[0])]
        if both:
            result = call()
            found = [result.detach(), *torch.autograd.grad(result, operation.leaves, grad.to(result.dtype))]
            checked += zip(whats, found, exact, allowed, strict=True)
        for what, one, other, most in checked:
            error = measure.difference(one, other)
            if not error <= most:
                return f"{what} wrong by {error:.1e} (relative), allowed {most:.0e}"
        return ""

    text = wrong(lambda: operation.call(impl))
    assert not text, f"{operation.name}, {impl}: {text}; not timed"
    left_out = {}
    for name, call in list(operation.baselines.items()):
        if name == REFERENCE:
            continue  # has just been run, and set the bounds
        if name == SDPA:
            assert not (text := wrong(call)), f"{operation.name}, {name}: {text}; not timed"
            continue
        try:
            text = wrong(call, backward)
        except Exception as error:  # a baseline that torch does not have for this call is not a failure
            text = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        if text:
            left_out[name] = text
            del operation.baselines[name]
    return left_out


def timed(operation: Operation, impl: str, backward: bool, rows: Any, shapes: Shapes, group: str, name: str) -> None:
    """Check an operation, then time it."""
    for baseline, why in require_right(operation, impl, shapes, backward).items():
        rows.note(f"{baseline}: {group}, {name}", why)
    with torch.set_grad_enabled(backward):
        labels = {**operation.labels, "impl": impl, "auto": operation.auto()}
    calls = operation.passes(impl, backward)
    if operation.product is not None and shapes.name != "cpu":
        calls[GEMM] = operation.product(backward)
    least = {"moved": operation.moved[backward], "flop": operation.flop[backward]}
    rows.time(group, f"{name} {impl}", calls, labels, queued=True, **least)


LAYERS = ["layer_mix", "layer_projection", *([] if SHAPES.name == "cpu" else [PER_SLOT])]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES.mix, ids=lambda shape: f"B{shape[0]}-S{shape[1]}")
@pytest.mark.parametrize("name", LAYERS, ids=lambda name: name.replace(", ", "-").replace(" ", "-"))
def test_layers(
    name: str, shape: tuple[int, int], impl: str, backward: bool, rows: Any, benchmark: Any, shapes: Shapes
) -> None:
    serving("layer_projection" if name == PER_SLOT else name, impl, shapes.device)
    operation = operations.layers(name, *shape, shapes.mix_sizes, shapes.device, shapes.dtype)
    group = f"{name}, forward and backward" if backward else name
    timed(operation, impl, backward, rows, shapes, group, f"B{shape[0]} S{shape[1]}")


# One query per sequence (T 1) is a decoding step, which has no backward.
PASSES = [(shape, backward) for shape in SHAPES.attention for backward in ((False, True) if shape[1] > 1 else (False,))]


def pass_id(value: tuple[int, int, int] | bool) -> str:
    """B2-T512-S64, or which passes."""
    return "B{}-T{}-S{}".format(*value) if isinstance(value, tuple) else "both" if value else "forward"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("heads", ["mha", "gqa", *([] if SHAPES.name == "cpu" else ["mha-unpadded"])])
@pytest.mark.parametrize(("shape", "backward"), PASSES, ids=pass_id)
def test_attention(
    shape: tuple[int, int, int], backward: bool, heads: str, impl: str, rows: Any, benchmark: Any, shapes: Shapes
) -> None:
    """Torch's FlashAttention takes no mask, so it is compared with where nothing is padded."""
    batch, length, source = shape
    serving("gated_cross_attention", impl, shapes.device)
    count, size = shapes.attention_heads
    groups, padded = count // 4 if heads == "gqa" else count, heads != "mha-unpadded"
    operation = operations.attention(batch, length, source, count, groups, size, shapes.device, shapes.dtype, padded)
    name = f"B{batch} T{length} S{source} H{count}/{groups}" + ("" if padded else " unpadded")
    if shapes.name == "cpu":
        rows.note(FLEX, "not compared on a CPU: torch compiles it for a GPU")
    elif impl == next(each for each in IMPLS if not reason_against("gated_cross_attention", each, shapes.device)):
        more_baselines(operation, name, heads == "mha", rows, shapes)
    kind = "decode" if length == 1 else "forward and backward" if backward else "forward"
    timed(operation, impl, backward, rows, shapes, f"gated_cross_attention, {kind}", name)


def more_baselines(operation: Operation, name: str, compiling: bool, rows: Any, shapes: Shapes) -> None:
    """Torch's attention by each backend, over packed tokens, and, if ``compiling`` for many seconds, FlexAttention."""
    operation.baselines |= operations.sdpa_backends(operation)
    for baseline, make in ((VARLEN, operations.varlen), (FLEX, operations.flex)):
        if baseline == FLEX and (shapes.device == "cpu" or not compiling):
            rows.note(f"{FLEX}: {name}", "compared on a GPU, with padding, as many key/value heads as query heads")
            continue
        try:
            operation.baselines[baseline] = make(operation)
        except Exception as error:  # one that torch does not have or cannot compile here is not a failure
            text = str(error).splitlines()[0][:200] if str(error) else ""
            rows.note(f"{baseline}: {name}", f"{type(error).__name__}: {text}")
