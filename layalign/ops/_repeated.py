"""Decoding asks for the same attention again and again, with a new query: what the first call checked is kept.

A full call describes and checks six tensors, 25 microseconds of Python, and several times that where the LLM's weights
have just swept the caches. :class:`RepeatedDecode` keeps what cannot have changed and looks at what may have: once for
all layers of a pass through the LLM (:meth:`RepeatedDecode.prepare`), at the query and the base in each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layalign.ops import _direct, backends, extension
from layalign.ops.gated_cross_attention import MAX_DECODE_ROWS


def _kind(query: Tensor, base: Tensor) -> tuple[Any, ...]:
    """What must not change from call to call in the tensors that do."""
    return query.shape, query.stride(), query.dtype, base.shape, base.stride(), base.dtype


class RepeatedDecode:
    """The C++ decoding kernel with keys, values, mask and scale held fast; the arguments passed a full call already.

    Use :meth:`after`, which knows where it applies.
    """

    def __init__(self, inputs: tuple[Any, ...], scale: float | None, impl: str) -> None:
        query, key, value, gate, base, mask = inputs
        self._kept = key, value, mask  # their addresses are in what follows
        self._impl, self._scale, self._gate_dtype = impl, scale, gate.dtype
        self._like = _kind(query, base)
        self._base_is_like_out = base.is_contiguous() and base.dtype == query.dtype
        described = map(extension.describe, inputs)
        factor = key.shape[-1] ** -0.5 if scale is None else float(scale)
        out = extension.describe(torch.empty(base.shape, dtype=query.dtype))
        self._decode = extension.module().RepeatedDecode((*described, factor), out)
        self._gate, self._threads = 0, 0  # told by `prepare`; the kernel refuses these

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
        if gate.numel() != 1 or not gate.is_cpu:
            return None  # sharded or offloaded: it is here only while its module runs
        if gate.dim() > 1 or not {gate.dtype, base.dtype} <= extension.DTYPES.keys():
            return None  # a full call brings them to one number and to float32 first
        if query.stride(-1) != 1 or base.stride(-1) != 1:
            return None
        return RepeatedDecode(kept, scale, asked)

    def __deepcopy__(self, memo: Any) -> None:
        """A copy's tensors lie elsewhere; it starts with a full call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def prepare(self, key: Tensor, value: Tensor, gate: Any, mask: Tensor | None, impl: str) -> bool:
        """Whether the calls that follow may be made: for as long as these arguments and torch's modes stay.

        The caller has asked :func:`layalign.ops._direct.quiet`.
        """
        kept = self._kept
        if key is not kept[0] or value is not kept[1] or mask is not kept[2] or impl != self._impl:
            return False
        if type(gate) not in _direct.PLAIN or not gate.is_cpu or gate.dtype != self._gate_dtype or gate.is_neg():
            return False
        self._gate, self._threads = gate.data_ptr(), torch.get_num_threads()
        return True

    def __call__(self, query: Tensor, base: Tensor, scale: float | None) -> Tensor | None:
        """(B, T, H, d), or None where this call is not like the first one."""
        if type(query) is not Tensor or type(base) is not Tensor or _kind(query, base) != self._like:
            return None
        if scale != self._scale or not query.is_cpu or not base.is_cpu or query.is_neg() or base.is_neg():
            return None
        # The first is the quicker one by microseconds.
        out = torch.empty_like(base) if self._base_is_like_out else torch.empty(base.shape, dtype=query.dtype)
        self._decode(query.data_ptr(), self._gate, base.data_ptr(), out.data_ptr(), self._threads)
        return out
