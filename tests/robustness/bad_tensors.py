"""Tensors as nobody should pass them: what one argument of an operation may be replaced by."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

HUGE = 2**45  # of any element size more than this machine has, so that an allocation fails at once


def resized(tensor: Tensor, dim: int, size: int) -> Tensor:
    """With another size of one dimension; larger ones repeat one element without memory."""
    if size <= tensor.shape[dim]:
        return tensor.narrow(dim, 0, size)
    if tensor.shape[dim] == 0:
        return tensor.new_zeros([max(n, 1) for n in tensor.shape]).expand(
            [size if i == dim else n for i, n in enumerate(tensor.shape)]
        )
    return tensor.narrow(dim, 0, 1).expand([size if i == dim else n for i, n in enumerate(tensor.shape)])


def _first(value: float) -> Callable[[Tensor], Tensor]:
    def put(tensor: Tensor) -> Tensor:
        if not tensor.numel() or not tensor.is_floating_point():
            return tensor
        tensor = tensor.detach().clone()
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor

    return put


def _strided(step: int) -> Callable[[Tensor], Tensor]:
    """Every element overlaps with its neighbours: all strides are `step` (0: one element for all)."""

    def view(tensor: Tensor) -> Tensor:
        if not tensor.numel():
            return tensor
        return torch.as_strided(
            tensor.detach().contiguous(), tensor.shape, [step if n > 1 else 0 for n in tensor.shape]
        )

    return view


def _odd_offset(tensor: Tensor) -> Tensor:
    """The same values, one element behind the start of a larger memory."""
    memory = tensor.new_zeros(tensor.numel() + 1)
    memory[1:] = tensor.detach().reshape(-1)
    return memory[1:].view(tensor.shape)


def _every_other(tensor: Tensor) -> Tensor:
    return tensor.detach().repeat_interleave(2, dim=-1)[..., ::2] if tensor.dim() else tensor


def _negated(tensor: Tensor) -> Tensor:
    """A lazily negated view, as `x.conj().imag` is: its memory holds the opposite of its values."""
    return torch._neg_view(-tensor.detach()) if tensor.is_floating_point() else tensor


# These leave a valid argument valid: the right result is wanted.
HARMLESS: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": _first(float("nan")),
    "inf": _first(float("inf")),
    "-inf": _first(float("-inf")),
    "large": _first(3e38),
    "tiny": _first(1e-42),
    "one element": _strided(0),
    "overlapping": _strided(1),
    "odd offset": _odd_offset,
    "every other": _every_other,
    "other order": lambda t: t.detach().transpose(0, -1).contiguous().transpose(0, -1) if t.dim() else t,
    "lazily negated": _negated,
    "zero": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "parameter": lambda t: torch.nn.Parameter(t.detach().clone(), requires_grad=False) if t.is_floating_point() else t,
}

# These are errors, or a mix of dtypes that an operation takes.
HARMFUL: dict[str, Callable[[Tensor], object]] = {
    "more dimensions": lambda t: t[None],
    "fewer dimensions": lambda t: t.sum(0) if t.dim() else t[None, None],
    "no dimension": lambda t: t.sum() if t.dtype != torch.bool else t.any(),
    "int64": lambda t: t.long(),
    "uint8": lambda t: t.to(torch.uint8),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "float64": lambda t: t.double(),
    "float32": lambda t: t.float(),
    "float16": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "sparse rows": lambda t: t.to_sparse_csr() if t.dim() == 2 else t.to_sparse(),
    "mkldnn": lambda t: t.float().to_mkldnn() if t.dim() else t.to("meta"),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor([t.detach().float(), t.detach().float()]),
    "huge first": lambda t: resized(t, 0, HUGE) if t.dim() else t[None, None],
    "huge last": lambda t: resized(t, -1, HUGE) if t.dim() else t[None, None],
    "huge all": lambda t: t.new_zeros([1] * t.dim()).expand([2**20] * t.dim()) if t.dim() > 2 else resized(t, 0, 2**62),
    "none of them": lambda t: resized(t, 0, 0) if t.dim() else t[None, None],
    "no width": lambda t: resized(t, -1, 0) if t.dim() else t[None, None],
    "one less": lambda t: resized(t, 0, max(t.shape[0] - 1, 0)) if t.dim() else t[None, None],
    "one more": lambda t: resized(t, -1, t.shape[-1] + 1) if t.dim() else t[None, None],
    "numpy": lambda t: np.zeros(tuple(t.shape)),
    "list": lambda t: [1.0, 2.0],
    "text": lambda t: "hidden",
    "number": lambda t: 3,
    "nothing": lambda t: None,
    "type": lambda t: Tensor,
    "object": lambda t: object(),
}  # fmt: skip
