"""Decoding calls of gated cross-attention that repeat an earlier one with other tensors of the same kind.

A full call describes and checks six tensors. That takes 25 microseconds of Python, several times as long where the
LLM's products have just emptied the caches, and Triton's launch takes as much again. So :class:`CachedDecode` keeps the
checked description of a full call, with its keys, values, mask and scale, and the layer's calls after it pass addresses
alone. What may have changed is checked once for all layers of a pass through the LLM (:func:`possible`,
:meth:`CachedDecode.prepare`). Query, residual and all addresses are checked in each call, because a tensor's memory may
move in between.

The backends "cpp" and "triton" support this: their ``cached_decode``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layalign.ops import backends, checks, dispatch, extension
from layalign.ops.backends.base import Decode
from layalign.ops.gated_cross_attention import MAX_DECODE_ROWS

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]  # query, key, value, gate, residual, mask


def possible() -> bool:
    """Whether calls may be cached ones: no gradients, and no mode, trace, transform or profiler sees them.

    Asked once for all layers of a pass.
    """
    return not torch.is_grad_enabled() and dispatch.can_skip_dispatcher()


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    """What must stay the same in a tensor that is another one in every call."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _layout(key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
    """What a kernel knows of keys, values and mask beside their addresses."""
    own = key.shape, key.stride(), key.dtype, key.is_neg(), value.shape, value.stride(), value.dtype, value.is_neg()
    return own if mask is None else (*own, mask.shape, mask.stride(), mask.dtype)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _is_like_result(query: Tensor, residual: Tensor) -> bool:
    """Whether ``residual`` has the result's dtype and layout."""
    return residual.dtype == query.dtype and residual.is_contiguous()


def _result(query: Tensor, residual: Tensor) -> Tensor:
    """Memory for (B, T, H, d) in the query's dtype."""
    if _is_like_result(query, residual):
        return torch.empty_like(residual)  # microseconds faster
    return torch.empty(residual.shape, dtype=query.dtype, device=query.device)


def _backend(inputs: Inputs, impl: str) -> backends.KernelBackend | None:
    """The backend whose kernels take these tensors without a copy or a cast."""
    query, key, value, gate, residual, mask = inputs
    device = query.device
    if impl == "auto":
        impl = backends.choose("gated_cross_attention", device.type, query, key, value, gate, residual)
    plain = query.dtype == key.dtype == value.dtype and key.stride(-1) == value.stride(-1) == 1
    if not plain or query.numel() == 0 or checks.autocast_dtype(query) not in (None, query.dtype):
        return None
    if gate.numel() != 1 or any(
        each is not None and each.device != device for each in (key, value, gate, residual, mask)
    ):
        return None  # a sharded or offloaded gate is on the device only while its module runs
    if gate.dim() > 1 or not {query.dtype, gate.dtype, residual.dtype} <= extension.DTYPES.keys():
        return None  # a full call converts them first
    found = backends.get(impl) if query.stride(-1) == residual.stride(-1) == 1 else None
    return found if isinstance(found, backends.KernelBackend) else None


def side_by_side(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, G, S, d) with the tokens of a head side by side in memory, for decoding on a CPU.

    The aligner writes all heads of a token side by side. Decoding reads head by head, and is a quarter faster this way.
    States on other devices, and states that need gradients, are returned as they are.
    """
    if not (key.is_cpu and value.is_cpu) or torch.is_grad_enabled() or key.requires_grad or value.requires_grad:
        return key, value  # re-entrant checkpoints run once without gradients, with states that need theirs
    with torch.inference_mode(False):  # a training pass over the same source may follow
        return key.contiguous(), value.contiguous()


class CachedDecode:
    """A layer's decoding kernel with keys, values, mask and scale kept from a full call. Made by :meth:`after`.

    It holds addresses, so its owner leaves it out of copies and pickles.
    """

    def __init__(self, inputs: Inputs, scale: float | None, impl: str, decode: Decode, in_place: bool) -> None:
        query, key, value, gate, residual, mask = inputs
        self._kept = key, value, mask
        self._types, self._layout = (type(key), type(value), type(mask)), _layout(key, value, mask)
        self._at_key, self._at_value, self._at_mask = map(_address, self._kept)
        self._impl, self._scale, self._autocast = impl, scale, checks.autocast_dtype(query)
        self._device = query.device.type
        self._like, self._like_gate = (_kind(query), _kind(residual)), (gate.dtype, gate.device)
        self._decode, self._in_place = decode, in_place and _is_like_result(query, residual)
        self._gate: Tensor | None = None  # set by `prepare`

    @staticmethod
    def after(inputs: Inputs, scale: float | None, impl: str) -> CachedDecode | None:
        """For the calls after a full one with these arguments, or None where they must be full calls too."""
        query, residual = inputs[0], inputs[4]
        if query.shape[2] > MAX_DECODE_ROWS or not dispatch.can_skip_dispatcher(inputs):
            return None
        if (backend := _backend(inputs, impl)) is None:
            return None
        decode = backend.cached_decode(inputs, scale, _result(query, residual))
        return None if decode is None else CachedDecode(inputs, scale, impl, decode, backend.decodes_in_place)

    def prepare(self, key: Tensor, value: Tensor, gate: Any, mask: Tensor | None, impl: str) -> bool:
        """Whether calls may be made, as long as these arguments and torch's modes stay the same.

        The caller has checked :func:`possible`.
        """
        kept = self._kept
        if key is not kept[0] or value is not kept[1] or mask is not kept[2] or impl != self._impl:
            return False
        # The same object may have other memory and another layout: offloading, `.data =`, `set_`, `swap_tensors`.
        if (type(key), type(value), type(mask)) != self._types or _layout(key, value, mask) != self._layout:
            return False
        if type(gate) not in checks.PLAIN_TYPES or gate.is_neg() or gate.numel() != 1:
            return False
        if (gate.dtype, gate.device) != self._like_gate:
            return False
        autocast = torch.get_autocast_dtype(self._device) if torch.is_autocast_enabled(self._device) else None
        if autocast != self._autocast:
            return False
        self._gate = gate
        return True

    def __call__(self, query: Tensor, residual: Tensor, scale: float | None, overwrite: bool = False) -> Tensor | None:
        """(B, T, H, d), or None where this call is of another kind.

        ``overwrite``: the result may be written to ``residual``.
        """
        if type(query) is not Tensor or type(residual) is not Tensor or (_kind(query), _kind(residual)) != self._like:
            return None
        gate = self._gate
        if gate is None or scale != self._scale or query.is_neg() or residual.is_neg():
            return None
        key, value, mask = self._kept
        if key.data_ptr() != self._at_key or value.data_ptr() != self._at_value or not (at := gate.data_ptr()):
            return None
        if mask is not None and mask.data_ptr() != self._at_mask:
            return None
        out = residual if overwrite and self._in_place else _result(query, residual)
        return out if self._decode(query.data_ptr(), at, residual.data_ptr(), out.data_ptr()) else None
