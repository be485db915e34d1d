"""Inputs of the operations, the backends that serve them here, the error budget, and modes that watch calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from layalign.ops import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MIX_SHAPES = [  # E, 2L, B, S, D_e
    (1, 2, 1, 1, 1),
    (5, 6, 2, 7, 11),
    (24, 64, 1, 3, 70),
    (33, 4, 1, 63, 59),
    (64, 6, 2, 9, 8),
    (3, 130, 1, 2, 40),
]


def serving(*operations: str) -> list[str]:
    """The backends that serve all of these operations here."""
    return [name for name in backends.names() if all(backends.serves(o, name, DEVICE)[0] for o in operations)]


def within_budget(found: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """No worse than twice plain torch in the same dtype, both against float64 (a few ulps when torch is exact)."""
    floor = torch.finfo(dtype).eps * exact.abs().max()
    budget = 2 * (plain.double() - exact).abs().max() + 2 * floor
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() <= budget


def skip_unserved(impl: str, dtype: torch.dtype) -> None:
    if (impl, dtype, DEVICE) == ("triton", torch.bfloat16, "cpu"):
        pytest.skip("Triton's interpreter computes bfloat16 products wrongly")


def mix_inputs(e=5, slots=6, b=2, s=7, d=11, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)  # noqa: E731
    return [draw(b, s, d) for _ in range(e)], draw(slots, e), draw(slots), draw(13, d), draw(13)


def attention_inputs(b=2, h=4, g=2, t=5, s=7, d=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)  # noqa: E731
    gate = torch.tensor([0.7], dtype=dtype, device=DEVICE)
    return draw(b, h, t, d), draw(b, g, s, d), draw(b, g, s, d), gate, draw(b, t, h, d)


def mix_arguments(shape, dtype, seed: int = 0):
    """:func:`mix_inputs` of these sizes, all requiring gradients."""
    return same_values(mix_inputs(*shape, dtype=dtype, seed=seed), dtype)


def mix_leaves(arguments) -> list[Tensor]:
    return [*arguments[0], *arguments[1:]]


def mix_gradients(function, arguments, seed: int = 1) -> list[Tensor]:
    """Gradients of all of ``arguments`` for a drawn one of the result."""
    out = function(*arguments)
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    return list(torch.autograd.grad(out, mix_leaves(arguments), grad))


def doubled(arguments):
    """``arguments`` in float64, in the graph of the given ones."""
    return [None if a is None else [t.double() for t in a] if isinstance(a, list) else a.double() for a in arguments]


def same_values(arguments, dtype):
    """Copies of ``arguments`` in another dtype, all requiring gradients."""
    copies = [([t.detach().to(dtype) for t in a] if isinstance(a, list) else a.detach().to(dtype)) for a in arguments]
    for leaf in mix_leaves(copies):
        leaf.requires_grad_()
    return copies


BACKENDS = [name for name in serving("gated_cross_attention") if name != "torch"]


def inputs(b, h, g, t, s, d, dtype=torch.float32, gate=0.7, seed=0) -> list[Tensor]:
    """query, key, value, gate, residual; all but the gate with the strides that transformers hands over."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int, rows: int) -> Tensor:
        states = torch.randn(b, rows, heads, d, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
        return states.transpose(1, 2)

    gates = torch.tensor([gate], dtype=dtype, device=DEVICE)
    return [draw(h, t), draw(g, s), draw(g, s), gates, draw(h, t).transpose(1, 2)]


def make_mask(kind: str, b: int, s: int) -> Tensor | None:
    """(B, S): "random", "left" or "right" padding, "row" (the first sequence all masked); None for "none"."""
    if kind == "none":
        return None
    lengths = [max(1, s - 1 - (7 * i) % s) for i in range(b)]
    mask = torch.zeros(b, s, dtype=torch.bool)
    for i, length in enumerate(lengths):
        if kind == "left":
            mask[i, s - length :] = True
        elif kind == "right":
            mask[i, :length] = True
        else:
            mask[i] = torch.rand(s, generator=torch.Generator().manual_seed(i)) > 0.4
    if kind == "row":
        mask[0] = False
    return mask.to(DEVICE)


def poison(states: Tensor, mask: Tensor | None) -> Tensor:
    """``states`` (B, G, S, d) with NaN where the source is masked, in the same strides."""
    if mask is None:
        return states
    return states.transpose(1, 2).masked_fill(~mask[:, :, None, None], torch.nan).transpose(1, 2)


class Recorded(TorchDispatchMode):
    """The names of the operations that the dispatcher sees, and the dtypes of their results (None for several)."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.dtypes: list[torch.dtype | None] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(func.name())
        self.dtypes.append(getattr(result, "dtype", None))
        return result


class Subclass(Tensor):
    pass


class Watching(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))
