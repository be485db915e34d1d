"""Calls of gated cross-attention that repeat an earlier one with other tensors of the same kind.

A full call describes and checks six tensors. That takes 25 microseconds of Python in decoding and 100 in training,
several times as long where the LLM's products have just emptied the caches, and Triton's launches take as much again.
So the checked description of a full call is kept, and the calls after it pass addresses alone:

- :class:`CachedDecode` belongs to one layer and keeps keys, values, mask and scale. What may have changed is checked
  once for all layers of a pass through the LLM (:meth:`CachedDecode.prepare`). Query, base and all addresses are
  checked in each call, because a tensor's memory may move in between.
- :class:`CachedTraining` is a call with gradients, for one layer in one pass. Every tensor is new in every step; the
  kernels' calls are kept by the kinds of all tensors, for all layers together.

The backends "cpp" and "triton" support this, with what their ``cached_launches`` returns:
``cached_launch_cpp.py`` and ``kernels/cached_launch.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layalign.ops import backends, checks, dispatch, extension
from layalign.ops.gated_cross_attention import MAX_DECODE_ROWS, forward, gradients, keep

MOST_KINDS = 256  # kept at a time
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]  # query, key, value, gate, base, mask


def _part(backend: str) -> Any:
    """The module with a backend's cached launches, or None."""
    has = backends.get(backend)
    return has.cached_launches() if isinstance(has, backends.KernelBackend) else None


def _kind(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """What must stay the same in a tensor that is another one in every call."""
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def _layout(key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
    """What a kernel knows of keys, values and mask beside their addresses."""
    own = key.shape, key.stride(), key.dtype, key.is_neg(), value.shape, value.stride(), value.dtype, value.is_neg()
    return own if mask is None else (*own, mask.shape, mask.stride(), mask.dtype)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _held(key: Tensor, value: Tensor, gate: Any, mask: Tensor | None, impl: str) -> tuple[Any, ...]:
    """The kinds of a layer's arguments that are known before its query."""
    return (impl, checks.autocast_dtype(key), *map(_kind, (key, value, gate, mask)))


def _is_like_result(query: Tensor, base: Tensor) -> bool:
    """Whether ``base`` has the result's dtype and layout."""
    return base.dtype == query.dtype and base.is_contiguous()


def _result(query: Tensor, base: Tensor) -> Tensor:
    """Memory for (B, T, H, d) in the query's dtype."""
    if _is_like_result(query, base):
        return torch.empty_like(base)  # microseconds faster
    return torch.empty(base.shape, dtype=query.dtype, device=query.device)


def _backend(inputs: Inputs, impl: str) -> str | None:
    """The backend whose kernels take these tensors without a copy or a cast, if it has cached launches."""
    query, key, value, gate, base, mask = inputs
    device = query.device
    if impl == "auto":
        impl = backends.choose("gated_cross_attention", device.type, query, key, value, gate, base)
    plain = query.dtype == key.dtype == value.dtype and key.stride(-1) == value.stride(-1) == 1
    if not plain or query.numel() == 0 or checks.autocast_dtype(query) not in (None, query.dtype):
        return None
    if gate.numel() != 1 or any(each is not None and each.device != device for each in (key, value, gate, base, mask)):
        return None  # a sharded or offloaded gate is on the device only while its module runs
    if gate.dim() > 1 or not {query.dtype, gate.dtype, base.dtype} <= extension.DTYPES.keys():
        return None  # a full call converts them first
    return impl if query.stride(-1) == base.stride(-1) == 1 and _part(impl) is not None else None


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
    """A layer's decoding kernel with keys, values, mask and scale kept from a full call. Made by :meth:`after`."""

    def __init__(self, inputs: Inputs, scale: float | None, impl: str, backend: str) -> None:
        query, key, value, gate, base, mask = inputs
        self._kept = key, value, mask
        self._types, self._layout = (type(key), type(value), type(mask)), _layout(key, value, mask)
        self._at_key, self._at_value, self._at_mask = map(_address, self._kept)
        self._impl, self._scale, self._autocast = impl, scale, checks.autocast_dtype(query)
        self._device = query.device.type
        self._like, self._like_gate = (_kind(query), _kind(base)), (gate.dtype, gate.device)
        part = _part(backend)
        self._in_place = part.IN_PLACE and _is_like_result(query, base)
        self._decode = part.cached_decode(inputs, scale, _result(query, base))
        self._gate: Tensor | None = None  # set by `prepare`

    @staticmethod
    def after(inputs: Inputs, scale: float | None, impl: str) -> CachedDecode | None:
        """For the calls after a full one with these arguments, or None where they must be full calls too."""
        query = inputs[0]
        if query.shape[2] > MAX_DECODE_ROWS or not dispatch.can_skip_dispatcher(inputs):
            return None
        backend = _backend(inputs, impl)
        found = None if backend is None else CachedDecode(inputs, scale, impl, backend)
        return found if found is not None and found._decode is not None else None

    def __deepcopy__(self, memo: Any) -> None:
        """None: a copy's tensors have other memory, and it starts with a full call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def prepare(self, key: Tensor, value: Tensor, gate: Any, mask: Tensor | None, impl: str) -> bool:
        """Whether calls may be made, as long as these arguments and torch's modes stay the same.

        The caller has checked :func:`possible`, and that gradients are disabled.
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

    def __call__(self, query: Tensor, base: Tensor, scale: float | None, overwrite: bool = False) -> Tensor | None:
        """(B, T, H, d), or None where this call is of another kind; ``overwrite``: it may be written to ``base``."""
        if type(query) is not Tensor or type(base) is not Tensor or (_kind(query), _kind(base)) != self._like:
            return None
        gate = self._gate
        if gate is None or scale != self._scale or query.is_neg() or base.is_neg():
            return None
        key, value, mask = self._kept
        if key.data_ptr() != self._at_key or value.data_ptr() != self._at_value or not (at := gate.data_ptr()):
            return None
        if mask is not None and mask.data_ptr() != self._at_mask:
            return None
        out = base if overwrite and self._in_place else _result(query, base)
        return out if self._decode(query.data_ptr(), at, base.data_ptr(), out.data_ptr()) else None


class _Kernels:
    """Forward and backward of one backend for tensors of one kind."""

    def __init__(self, inputs: Inputs, scale: float | None, backend: str) -> None:
        query, key, value, gate, base, mask = inputs
        self._out, self._lse, self._dtype, self._device = base.shape, query.shape[:3], query.dtype, query.device
        self.backend = backend
        out, lse = self.results()
        self.attention = _part(backend).cached_attention(inputs, scale, out, lse)
        self.saved = [_kind(tensor) for tensor in (query, key, value, gate, mask, lse)]
        self.out = _kind(out)

    def results(self) -> tuple[Tensor, Tensor]:
        """New memory for out (B, T, H, d) in the query's dtype and the log-sum-exp (B, H, T) fp32."""
        # Not empty_like(base): its strides along a dimension of size one are arbitrary, the gradient's are not.
        out = torch.empty(self._out, dtype=self._dtype, device=self._device)
        return out, torch.empty(self._lse, dtype=torch.float32, device=self._device)


class _Cached(torch.autograd.Function):
    """The operation and its gradients by :class:`_Kernels`, or in full where those do not take the tensors."""

    @staticmethod
    def forward(ctx: Any, kernels: _Kernels, *inputs: Any) -> Tensor:
        output = kernels.results()
        if not kernels.attention.forward(inputs[:6], *output):
            output = forward(*inputs)
        keep(ctx, inputs, output)
        ctx.kernels = kernels
        return output[0]  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        kernels, needs = ctx.kernels, ctx.needs_input_grad[1:6]
        if grad is None or not any(needs[:4]):
            return None, *gradients(ctx, needs, grad)
        saved = ctx.saved_tensors
        found = kernels.attention.backward(saved, grad, needs[:4]) if _Cached.serves(kernels, saved, grad) else None
        if found is None:
            return None, *gradients(ctx, needs, grad, saved)
        return None, *found, grad.to(ctx.base_dtype) if needs[4] else None, None, None, None

    @staticmethod
    def serves(kernels: _Kernels, saved: Sequence[Tensor], grad: Tensor) -> bool:
        """Whether the backward may use the kernels too: hooks on saved tensors may change their layout."""
        if torch.is_grad_enabled() or not dispatch.can_skip_dispatcher((grad, *saved)) or _kind(grad) != kernels.out:
            return False
        return all(_kind(tensor) == kind for tensor, kind in zip(saved, kernels.saved, strict=True))


_KERNELS: dict[tuple[Any, ...], _Kernels] = {}


class CachedTraining:
    """One layer's call with gradients in the current pass, whose key, value, gate and mask are known beforehand.

    The caller has checked :func:`possible`.
    """

    def __init__(self, key: Tensor, value: Tensor, gate: Any, mask: Tensor | None, impl: str) -> None:
        self._held, self._impl = (key, value, gate, mask), impl

    def __call__(self, query: Tensor, base: Tensor, scale: float | None, overwrite: bool = False) -> Tensor | None:
        """(B, T, H, d), or None where no full call of this kind was made before, or no gradient is needed."""
        key, value, gate, mask = self._held
        inputs = query, key, value, gate, base, mask
        if type(query) is not Tensor or type(base) is not Tensor or not checks.are_in_memory(inputs):
            return None
        kind = scale, _kind(query), _kind(base), *_held(key, value, gate, mask, self._impl)
        if (kernels := _KERNELS.get(kind)) is None:
            return None
        if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in inputs):
            return None  # re-entrant checkpoints disable gradients during a pass
        return _Cached.apply(kernels, *inputs, scale, kernels.backend)  # type: ignore[no-any-return]

    @staticmethod
    def after(inputs: Inputs, scale: float | None, impl: str) -> None:
        """Keep the kernels for later calls of the kind of these arguments, where cached calls may serve them."""
        query, key, value, gate, base, mask = inputs
        if key.numel() == 0 or not dispatch.can_skip_dispatcher(inputs, differentiated=True):
            return
        if (backend := _backend(inputs, impl)) is None:
            return
        if any(torch.empty_like(tensor).stride(-1) != 1 for tensor in (query, key, value)):
            return  # overlapping rows: the gradient would have another layout
        if len(_KERNELS) >= MOST_KINDS:
            _KERNELS.clear()
        kind = scale, _kind(query), _kind(base), *_held(key, value, gate, mask, impl)
        kernels = _Kernels(inputs, scale, backend)
        if kernels.attention is not None:
            _KERNELS[kind] = kernels


Ready = CachedDecode | CachedTraining


def possible() -> bool:
    """Whether calls may be answered by :func:`ready`: no mode, trace, transform or profiler sees them.

    Asked once for all layers of a pass.
    """
    return dispatch.can_skip_dispatcher(differentiated=True)


def ready(
    cached: CachedDecode | None, key: Tensor, value: Tensor, gate: Any, mask: Tensor | None, impl: str
) -> Ready | None:
    """What may answer a layer's next call, or None where only a full call may. The caller has asked :func:`possible`.

    Args:
        cached: what :func:`after` returned for the layer's last call.
    """
    if not torch.is_grad_enabled():
        return cached if cached is not None and cached.prepare(key, value, gate, mask, impl) else None
    return CachedTraining(key, value, gate, mask, impl) if key.is_cpu or key.is_cuda else None


def after(tried: Ready | None, inputs: Inputs, scale: float | None, impl: str) -> CachedDecode | None:
    """What a full call with these arguments leaves for the layer's next one.

    Args:
        tried: what :func:`ready` returned, which did not answer this call.
    """
    if isinstance(tried, CachedTraining):
        CachedTraining.after(inputs, scale, impl)
    return CachedDecode.after(inputs, scale, impl)
