"""Whether tensors are still those that something was made from, without keeping their memory.

Writes past autograd's counters (through ``.data``, numpy, shared memory) leave no trace but the values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from layalign.ops.checks import PLAIN_TYPES


def reason_against_watching(tensors: Iterable[Tensor | None]) -> str | None:
    """Why a change of tensors would go unnoticed."""
    for tensor in tensors:
        if tensor is not None and type(tensor) not in PLAIN_TYPES:
            return f"{type(tensor).__name__} may have no memory of its own"
        if tensor is not None and tensor.is_inference():
            return "made in inference mode, it has no versions"
    return None


SAMPLE = 64  # about so many numbers of a tensor: more of them, far apart in memory, would cost time
# Integers of the same size as an element: a NaN is equal to itself, and no type is without a comparison.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """All numbers of ``tensor`` (N,), as integers; for a contiguous one a view."""
    return tensor.detach().flatten().view(_BITS[tensor.element_size()])


def sample(tensor: Tensor) -> Tensor:
    """Some of :func:`bits`, from all over the tensor: a write of all of it, or of a whole head, is found in them."""
    return bits(tensor)[:: max(1, tensor.numel() // SAMPLE) | 1]  # odd: not always the same column


def unwritten(before: Iterable[Tensor], now: Iterable[Tensor]) -> bool:
    """Whether numbers are still what they were; on a GPU it is waited for, and taken for granted in a captured call."""
    for one, two in zip(before, now, strict=True):
        if not (one.is_cuda and torch.cuda.is_current_stream_capturing()) and not torch.equal(one, two):
            return False
    return True


class Identity:
    """Which tensors, in which memory, in which layout, and after how many writes by autograd's counters.

    Storages are referred to weakly: their data are freed, and their addresses are not given out again. A tensor's own
    number may be (``torch.utils.swap_tensors`` refuses tensors with weak references), but not with the same storage.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        self._seen = [_seen(tensor) for tensor in tensors]

    def of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the tensors, unchanged."""
        return len(tensors) == len(self._seen) and all(map(_is_seen, tensors, self._seen))


def _seen(tensor: Tensor) -> tuple[Any, ...]:
    version = None if tensor.is_inference() else tensor._version
    storage = tensor.untyped_storage()._cdata
    return id(tensor), type(tensor), version, storage, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _is_seen(tensor: Tensor, seen: tuple[Any, ...]) -> bool:
    # First what every tensor has: one of another type may have no address.
    return id(tensor) == seen[0] and type(tensor) is seen[1] and _seen(tensor) == seen
