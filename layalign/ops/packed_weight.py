"""The C++ layer projection: its packed weights, and the calls that use it.

The kernels never write x, the relu's result, to memory, and skip the multiply-adds of its zeros (about half of them).
The result is exact: only a zero times a finite number is skipped.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from layalign.ops import backends, extension

MIN_WORK = 2**21  # multiply-adds per slot; below this the call costs more than it saves
MIN_ROWS = 320  # rows of x per weight; below this, packing it for a single call costs more than it saves
SETS = ("avx512", "avx2")  # instruction sets on which the kernels have beaten torch's dense product
# Numbers of x that a task mixes at a time, and rows of each slot: kMixed and kRows in csrc/cpu/layer_projection.cpp.
CACHED, ROWS = 2**18, 64
TOGETHER = 2**24  # bytes; glibc keeps blocks of up to twice this for reuse
COLUMNS_PER_LAYER = 48  # columns of the result that outweigh reading one layer's states per slot


@functools.cache
def available() -> bool:
    """Whether the kernels are installed, and fast on this machine."""
    return backends.capability("cpp", "cpu")[0] and extension.module().instruction_set() in SETS


def serves(hidden: Sequence[Tensor], columns: int, *others: Tensor | None) -> bool:
    """Whether the kernel takes E tensors (B, S, K) and weights (..., columns, K) of this kind, for any number of rows.

    It reads the E states again for every few slots. That must be little work against the products.
    """
    first, depth = hidden[0], hidden[0].shape[-1]
    if first.device.type != "cpu" or first.dtype != torch.float32 or depth == 0 or not available():
        return False
    together = max(1, CACHED // (ROWS * depth))
    if len(hidden) * COLUMNS_PER_LAYER > together * columns:
        return False
    return all(other is None or other.dtype == torch.float32 for other in others)


def pays(hidden: Sequence[Tensor], weight: Tensor, slots: int) -> bool:
    """Whether packing ``weight``, (N, K) for all slots or (2L, N, K), pays for a single call."""
    batch, length, depth = hidden[0].shape
    rows = batch * length
    packed_for = slots * rows if weight.dim() == 2 else rows
    return rows * depth * weight.shape[-2] >= MIN_WORK and packed_for >= MIN_ROWS


class PackedWeight:
    """Weights (J, N, K) as the kernel reads them: columns of ``width`` side by side, no larger than the weights.

    Attributes:
        data: (J, ceil(N / width), K, width) float32.
        columns: N.
        finite: whether all weights written so far are finite.
    """

    def __init__(self, slots: int, columns: int, depth: int) -> None:
        width = extension.module().packed_width()
        self.data = torch.empty((slots, -(-columns // width), depth, width))
        self.columns = columns
        self.finite = True

    @classmethod
    def of(cls, weight: Tensor) -> PackedWeight:
        """From weights (J, N, K), or one weight (N, K)."""
        weight = weight if weight.dim() == 3 else weight[None]
        packed = cls(*weight.shape)
        packed.put(slice(None), weight)
        return packed

    def put(self, slots: slice, weight: Tensor) -> None:
        """Write the weights (J', N, K) of ``slots``."""
        self.finite = extension.pack_weight(weight, self.data[slots]) and self.finite

    def dense(self) -> Tensor:
        """The weights (J, N, K), a copy."""
        return self.data.transpose(2, 3).flatten(1, 2)[:, : self.columns]


def project(
    hidden: Sequence[Tensor],
    mix_weight: Tensor,
    mix_bias: Tensor | None,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    outs: Sequence[Tensor] | None = None,
) -> Sequence[Tensor] | Tensor:
    """:func:`layalign.ops.layer_projection` by the kernel.

    Args:
        weight: as there, or packed; float32 like ``hidden`` and ``bias``.
        outs: 2L contiguous tensors (B, S, N) to write to.

    Returns:
        ``outs``; without them one tensor (2L, B, S, N), or 2L tensors (B, S, N) from :data:`TOGETHER` bytes on: a block
        of that size would come fresh from the system in every call.
    """
    packed = weight if isinstance(weight, PackedWeight) else PackedWeight.of(weight)
    if packed.data.shape[-1] != extension.module().packed_width():  # packed for another instruction set
        packed = PackedWeight.of(packed.dense())
    first, slots = hidden[0], mix_weight.shape[0]
    shape = *first.shape[:2], packed.columns
    found: Sequence[Tensor] | Tensor
    if outs is not None:
        found = outs
    elif slots * first.element_size() * math.prod(shape) < TOGETHER:
        found = first.new_empty((slots, *shape))
    else:
        found = [first.new_empty(shape) for _ in range(slots)]
    if slots and math.prod(shape):
        extension.layer_projection_forward(hidden, mix_weight, mix_bias, packed.data, packed.finite, bias, found)
    return found


def add_weight_gradient(total: Tensor, grads: Sequence[Tensor | None], x: Tensor) -> None:
    """total += sum_j x[j].T @ grads[j].

    Args:
        total: (K, N) contiguous, in the dtype of x or a wider one.
        grads: J tensors (..., N), or None for zeros.
        x: (J, ..., K) contiguous.
    """
    if x.numel() == 0 or total.numel() == 0:
        return
    flat = x.view(x.shape[0], -1, x.shape[-1])
    rows = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
    fp32 = all(tensor is None or tensor.dtype == torch.float32 for tensor in (x, total, *rows))
    if x.device.type == "cpu" and fp32 and available() and flat.shape[1] * total.numel() >= MIN_WORK:
        extension.layer_projection_backward(flat, rows, total[None])
        return
    there = [(each, grad) for each, grad in zip(flat, rows, strict=True) if grad is not None]
    if there and x.dtype != total.dtype:  # half precision: a single product rounds once
        there = [(torch.cat(each), torch.cat(grad)) for each, grad in [zip(*there, strict=True)]]
    for each, grad in there:
        if grad.dtype == each.dtype == total.dtype:
            total.addmm_(each.T, grad)
        else:
            total.add_(each.T.to(grad.dtype) @ grad)
