"""Decoding asks for the same attention again and again, with a new query: what the first call checked is kept.

A full call describes and checks six tensors, 25 microseconds of Python, and several times that where the LLM's weights
have just swept the caches. :class:`RepeatedDecode` keeps what cannot have changed, looks at what may have, and hands
over addresses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layalign.ops import _direct, backends, extension
from layalign.ops.gated_cross_attention import MAX_DECODE_ROWS


def _kind(query: Tensor, gate: Tensor, base: Tensor) -> tuple[Any, ...]:
    """What must not change from call to call in the tensors that do."""
    return (
        query.shape, query.stride(), query.dtype, base.shape, base.stride(), base.dtype, gate.dtype,
        query.is_cpu, gate.is_cpu, base.is_cpu,
    )  # fmt: skip


class RepeatedDecode:
    """The C++ decoding kernel with keys, values, mask and scale held fast; the arguments passed a full call already.

    Use :meth:`after`, which knows where it applies.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gate: Tensor,
        base: Tensor,
        mask: Tensor | None,
        scale: float | None,
        impl: str,
    ) -> None:
        self._kept = key, value, mask, scale, impl  # the addresses of the first three are in what follows
        self._like = _kind(query, gate, base)
        self._base_is_like_out = base.is_contiguous() and base.dtype == query.dtype
        described = map(extension.describe, (query, key, value, gate, base, mask))
        factor = key.shape[-1] ** -0.5 if scale is None else float(scale)
        out = extension.describe(torch.empty(base.shape, dtype=query.dtype))
        self._decode = extension.module().RepeatedDecode((*described, factor), out)

    @staticmethod
    def after(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gate: Tensor,
        base: Tensor,
        mask: Tensor | None,
        scale: float | None,
        impl: str,
    ) -> RepeatedDecode | None:
        """For the calls that follow one with these arguments; None where only full calls will do."""
        asked, kept = impl, (query, key, value, gate, base, mask)
        if query.device.type != "cpu" or query.shape[2] > MAX_DECODE_ROWS or not _direct.unobserved(kept):
            return None
        if impl == "auto":
            impl = backends.choose("gated_cross_attention", "cpu", query, key, value, gate, base)
        plain = query.dtype == key.dtype == value.dtype and key.stride(-1) == value.stride(-1) == 1
        if impl != "cpp" or not plain or torch.is_autocast_enabled("cpu") or query.numel() == 0:
            return None
        if gate.dim() > 1 or not {gate.dtype, base.dtype} <= extension.DTYPES.keys():
            return None  # a full call brings them to one number and to float32 first
        if query.stride(-1) != 1 or base.stride(-1) != 1:
            return None
        return RepeatedDecode(query, key, value, gate, base, mask, scale, asked)

    def __deepcopy__(self, memo: Any) -> None:
        """A copy's tensors lie elsewhere; it starts with a full call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gate: Tensor,
        base: Tensor,
        mask: Tensor | None,
        scale: float | None,
        impl: str,
    ) -> Tensor | None:
        """(B, T, H, d), or None where this call is not like the first one."""
        kept = self._kept
        if key is not kept[0] or value is not kept[1] or mask is not kept[2] or (scale, impl) != kept[3:]:
            return None
        if _kind(query, gate, base) != self._like or not _direct.unobserved((query, gate, base)):
            return None
        if torch.is_autocast_enabled("cpu"):
            return None
        # The first is the quicker one by microseconds.
        out = torch.empty_like(base) if self._base_is_like_out else torch.empty(base.shape, dtype=query.dtype)
        addresses = query.data_ptr(), gate.data_ptr(), base.data_ptr(), out.data_ptr()
        self._decode(*addresses, torch.get_num_threads())
        return out
