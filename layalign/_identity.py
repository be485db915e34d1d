"""Whether tensors are still those that something was made from, without keeping their memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from layalign.ops._direct import PLAIN


def reason_against_watching(tensors: Iterable[Tensor | None]) -> str | None:
    """Why a change of tensors would go unnoticed."""
    for tensor in tensors:
        if tensor is not None and type(tensor) not in PLAIN:
            return f"{type(tensor).__name__} may have no memory of its own"
        if tensor is not None and tensor.is_inference():
            return "made in inference mode, it has no versions"
    return None


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
    storage, version = tensor.untyped_storage()._cdata, tensor._version
    return id(tensor), type(tensor), version, storage, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _is_seen(tensor: Tensor, seen: tuple[Any, ...]) -> bool:
    if id(tensor) != seen[0] or type(tensor) is not seen[1] or tensor.is_inference():
        return False  # of another kind it may have no address or version
    return _seen(tensor) == seen
