"""Whether tensors are still those that something was made from, without keeping their memory.

Writes that autograd's version counters miss (``.data``, numpy, shared memory) show in the values only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from layalign.ops.checks import PLAIN_TYPES


def reason_against_watching(tensors: Iterable[Tensor | None]) -> str | None:
    """Why a change of tensors would go unnoticed; None if it would be noticed."""
    for tensor in tensors:
        if tensor is not None and type(tensor) not in PLAIN_TYPES:
            return f"{type(tensor).__name__} may have no memory of its own"
        if tensor is not None and tensor.is_inference():
            return "it was made in inference mode and has no version counter"
    return None


SAMPLE = 64  # about this many numbers of a tensor are compared: they are far apart in memory, so more would be slow
# Integers of the size of an element: as integers a NaN equals itself, and every dtype can be compared.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """All numbers of ``tensor`` (N,), as integers; for a contiguous one a view."""
    return tensor.detach().flatten().view(_BITS[tensor.element_size()])


def sample(tensor: Tensor) -> Tensor:
    """A sample of :func:`bits` from all over the tensor: a write of all of it, or of one head, changes the sample."""
    return bits(tensor)[:: max(1, tensor.numel() // SAMPLE) | 1]  # odd: not always the same column


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: what is queued on ``device`` is computed at its replay."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def unwritten(before: Iterable[Tensor], now: Iterable[Tensor]) -> bool:
    """Whether numbers are unchanged. A GPU is waited for once; while it captures a CUDA graph, the answer is yes."""
    on_device = []
    for one, two in zip(before, now, strict=True):
        if is_capturing(one.device):
            continue
        if one.is_cpu or one.shape != two.shape:
            if not torch.equal(one, two):
                return False
        else:
            on_device.append((one == two).all())
    return not on_device or bool(torch.stack([each.to(on_device[0].device) for each in on_device]).all())


class Identity:
    """Identifies tensors by object, storage, layout, dtype and version counter.

    Weak references to the storages let their data be freed, and keep their addresses from being used again. Tensors get
    no weak references, because ``torch.utils.swap_tensors`` refuses those that have some. A tensor's ``id`` may be used
    again, but not with the same storage.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        self._seen = [_seen(tensor) for tensor in tensors]

    def of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, unchanged."""
        return len(tensors) == len(self._seen) and all(map(_is_seen, tensors, self._seen))


def _seen(tensor: Tensor) -> tuple[Any, ...]:
    version = None if tensor.is_inference() else tensor._version
    storage = tensor.untyped_storage()._cdata
    return id(tensor), type(tensor), version, storage, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _is_seen(tensor: Tensor, seen: tuple[Any, ...]) -> bool:
    # Type first: a tensor of another type may have no address.
    return id(tensor) == seen[0] and type(tensor) is seen[1] and _seen(tensor) == seen
