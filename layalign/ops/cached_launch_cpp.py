"""Cached launches of the C++ kernels, for :mod:`layalign.ops.cached_launch`.

The names are those of ``kernels/cached_launch.py``, the same for Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from layalign.ops import extension

IN_PLACE = True  # decoding may write its result to the base
Inputs = Sequence[Tensor | None]  # query, key, value, gate, base, mask


def _described(inputs: Inputs, scale: float | None) -> tuple[Any, ...]:
    """(query, key, value, gate, base, mask, scale) as the extension takes them."""
    query = inputs[0]
    assert query is not None
    return (*map(extension.describe, inputs), query.shape[-1] ** -0.5 if scale is None else float(scale))


def cached_decode(inputs: Inputs, scale: float | None, out: Tensor) -> Callable[[int, int, int, int], bool]:
    """The decoding kernel. The caller keeps key, value and mask alive.

    Returns:
        A function of the addresses of query, gate, base and result, which may be the base's. It returns True.
    """
    decode = extension.module().CachedDecode(_described(inputs, scale), extension.describe(out))

    def run(at_query: int, at_gate: int, at_base: int, at_out: int) -> bool:
        decode(at_query, at_gate, at_base, at_out, torch.get_num_threads())
        return True

    return run


class CachedAttention:
    """Forward and backward for tensors of one kind, all on the CPU and with last strides of one."""

    def __init__(self, inputs: Inputs, scale: float | None, out: Tensor, lse: Tensor) -> None:
        query, key, value, gate, *_ = inputs
        assert query is not None and key is not None and value is not None and gate is not None
        results = [extension.describe(each) for each in (out, lse)]
        described = _described(inputs, scale)
        self._forward = extension.module().CachedForward(described, *results)
        found = *map(torch.empty_like, (query, key, value)), torch.empty(gate.shape, dtype=torch.float32)
        without_base = *described[:4], None, *described[5:]
        self._backward = extension.module().CachedBackward(without_base, *results, *map(extension.describe, found))

    def forward(self, inputs: Inputs, out: Tensor, lse: Tensor) -> bool:
        """Write ``out`` (B, T, H, d) and ``lse`` (B, H, T) fp32; returns True."""
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (*inputs, out, lse)]
        self._forward(*addresses, torch.get_num_threads())
        return True

    def backward(self, saved: Inputs, grad: Tensor, needs: tuple[bool, bool, bool, bool]) -> tuple[Tensor | None, ...]:
        """dq, dk, dv and dgate from what was saved (query, key, value, gate, mask, log-sum-exp); None unless needed."""
        gate = saved[3]
        assert gate is not None
        # In the inputs' layout, which is that of the projections that wrote them.
        found = [torch.empty_like(tensor) if need else None for tensor, need in zip(saved, needs[:3], strict=False)]  # type: ignore[arg-type]
        found.append(torch.empty(gate.shape, dtype=torch.float32) if needs[3] else None)
        parts = *saved[:5], grad, saved[5], *found
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in parts]
        self._backward(*addresses, torch.get_num_threads())
        if found[3] is not None and gate.dtype != torch.float32:
            found[3] = found[3].to(gate.dtype)
        return tuple(found)


cached_attention = CachedAttention  # a function that may return None for Triton
