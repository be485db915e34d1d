"""A model asks for the same attention again and again, with other tensors of the same kind: what was checked is kept.

A full call describes and checks six tensors, 25 microseconds of Python in decoding and 100 in training, several times
that where the LLM's products have just swept the caches, and Triton's launches take as much again. What a full call has
passed is kept here, and what follows it hands over addresses alone:

- :class:`RepeatedDecode`, a layer's own: keys, values, mask and scale are held fast. It looks at what may have changed
  once for all layers of a pass through the LLM (:meth:`RepeatedDecode.prepare`), and in each at query, base and where
  everything lies: whoever moves a tensor's memory in between must not have the old one read.
- :class:`RepeatedTraining`: a call with gradients, for one layer in one pass; every tensor is new in every step, and
  the kernels' calls are kept by the kinds of all of them, for all layers together.

Of the backends, "cpp" and "triton" can be called so, by what their ``cached_launches`` returns:
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
    """Where a backend's cached launches are, or None."""
    has = backends.get(backend)
    return has.cached_launches() if isinstance(has, backends.KernelBackend) else None


def _kind(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """What must not change from call to call in the tensors that do."""
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def _layout(key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
    """What a kernel that has their addresses knows of keys, values and mask beside them."""
    own = key.shape, key.stride(), key.dtype, key.is_neg(), value.shape, value.stride(), value.dtype, value.is_neg()
    return own if mask is None else (*own, mask.shape, mask.stride(), mask.dtype)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _held(key: Tensor, value: Tensor, gate: Any, mask: Tensor | None, impl: str) -> tuple[Any, ...]:
    """What is known of a layer's calls before its query comes."""
    return (impl, checks.autocast_dtype(key), *map(_kind, (key, value, gate, mask)))


def _is_like_result(query: Tensor, base: Tensor) -> bool:
    """Whether ``base`` has the result's dtype and layout."""
    return base.dtype == query.dtype and base.is_contiguous()


def _result(query: Tensor, base: Tensor) -> Tensor:
    """Memory for (B, T, H, d) in the query's dtype."""
    if _is_like_result(query, base):
        return torch.empty_like(base)  # the quicker one by microseconds
    return torch.empty(base.shape, dtype=query.dtype, device=query.device)


def _backend(inputs: Inputs, impl: str) -> str | None:
    """The backend whose kernels take the tensors as they are, without a copy or a cast, if it can be called again."""
    query, key, value, gate, base, mask = inputs
    device = query.device
    if impl == "auto":
        impl = backends.choose("gated_cross_attention", device.type, query, key, value, gate, base)
    plain = query.dtype == key.dtype == value.dtype and key.stride(-1) == value.stride(-1) == 1
    if not plain or query.numel() == 0 or checks.autocast_dtype(query) not in (None, query.dtype):
        return None
    if gate.numel() != 1 or any(each is not None and each.device != device for each in (key, value, gate, base, mask)):
        return None  # a gate that is sharded or offloaded is here only while its module runs
    if gate.dim() > 1 or not {query.dtype, gate.dtype, base.dtype} <= extension.DTYPES.keys():
        return None  # a full call brings them to one number and to float32 first
    return impl if query.stride(-1) == base.stride(-1) == 1 and _part(impl) is not None else None


def side_by_side(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The same states with the tokens of a head together in memory, where decoding steps on a CPU will read them.

    The aligner writes all heads of a token side by side; steps that read head by head are a quarter faster so.
    """
    if not (key.is_cpu and value.is_cpu) or torch.is_grad_enabled() or key.requires_grad or value.requires_grad:
        return key, value  # re-entrant checkpoints run once without gradients, over states that need theirs
    with torch.inference_mode(False):  # a pass that trains may follow over the same source
        return key.contiguous(), value.contiguous()


class RepeatedDecode:
    """A decoding kernel with keys, values, mask and scale held fast; the arguments passed a full call already.

    Use :meth:`after`, which knows where it applies.
    """

    def __init__(self, inputs: Inputs, scale: float | None, impl: str, backend: str) -> None:
        query, key, value, gate, base, mask = inputs
        self._kept = key, value, mask
        self._types, self._layout = (type(key), type(value), type(mask)), _layout(key, value, mask)
        self._at_key, self._at_value, self._at_mask = map(_address, self._kept)  # bound in what follows
        self._impl, self._scale, self._autocast = impl, scale, checks.autocast_dtype(query)
        self._device = query.device.type
        self._like, self._like_gate = (_kind(query), _kind(base)), (gate.dtype, gate.device)
        part = _part(backend)
        self._in_place = part.IN_PLACE and _is_like_result(query, base)
        self._decode = part.repeated_decode(inputs, scale, _result(query, base))
        self._gate: Tensor | None = None  # told by `prepare`

    @staticmethod
    def after(inputs: Inputs, scale: float | None, impl: str) -> RepeatedDecode | None:
        """For the calls that follow one with these arguments; None where only full calls will do."""
        query = inputs[0]
        if query.shape[2] > MAX_DECODE_ROWS or not dispatch.unobserved(inputs):
            return None
        backend = _backend(inputs, impl)
        found = None if backend is None else RepeatedDecode(inputs, scale, impl, backend)
        return found if found is not None and found._decode is not None else None

    def __deepcopy__(self, memo: Any) -> None:
        """A copy's tensors lie elsewhere; it starts with a full call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def prepare(self, key: Tensor, value: Tensor, gate: Any, mask: Tensor | None, impl: str) -> bool:
        """Whether the calls that follow may be made: for as long as these arguments and torch's modes stay.

        The caller has asked :func:`layalign.ops.dispatch.quiet`.
        """
        kept = self._kept
        if key is not kept[0] or value is not kept[1] or mask is not kept[2] or impl != self._impl:
            return False
        # The same objects may hold other memory by now, laid out anew: offloading, `.data =`, `set_`, `swap_tensors`.
        if (type(key), type(value), type(mask)) != self._types or _layout(key, value, mask) != self._layout:
            return False
        if type(gate) not in dispatch.PLAIN or gate.is_neg() or gate.numel() != 1:
            return False
        if (gate.dtype, gate.device) != self._like_gate:
            return False
        autocast = torch.get_autocast_dtype(self._device) if torch.is_autocast_enabled(self._device) else None
        if autocast != self._autocast:
            return False
        self._gate = gate
        return True

    def __call__(self, query: Tensor, base: Tensor, scale: float | None, overwrite: bool = False) -> Tensor | None:
        """(B, T, H, d), or None where this call is not like the first one; ``overwrite``: written into ``base``."""
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
        self.attention = _part(backend).repeated_attention(inputs, scale, out, lse)
        self.saved = [_kind(tensor) for tensor in (query, key, value, gate, mask, lse)]
        self.out = _kind(out)

    def results(self) -> tuple[Tensor, Tensor]:
        """Fresh memory for the forward's: out (B, T, H, d) in the query's dtype, log-sum-exp (B, H, T) fp32."""
        # Not like the base, whose strides along a dimension of one may be any: the gradient's are the usual ones.
        out = torch.empty(self._out, dtype=self._dtype, device=self._device)
        return out, torch.empty(self._lse, dtype=torch.float32, device=self._device)


class _Short(torch.autograd.Function):
    """The operation and its gradients by :class:`_Kernels`."""

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
        found = kernels.attention.backward(saved, grad, needs[:4]) if _Short.serves(kernels, saved, grad) else None
        if found is None:
            return None, *gradients(ctx, needs, grad, saved)
        return None, *found, grad.to(ctx.base_dtype) if needs[4] else None, None, None, None

    @staticmethod
    def serves(kernels: _Kernels, saved: Sequence[Tensor], grad: Tensor) -> bool:
        """Whether the backward may be short as the forward was: hooks on saved tensors may lay them out anew."""
        if not dispatch.quiet() or _kind(grad) != kernels.out or not dispatch.whole((grad, *saved)):
            return False
        return all(_kind(tensor) == kind for tensor, kind in zip(saved, kernels.saved, strict=True))


_KERNELS: dict[tuple[Any, ...], _Kernels] = {}


class RepeatedTraining:
    """One layer's call with gradients in the pass under way, whose key, value, gate and mask are known beforehand.

    The caller has asked :func:`layalign.ops.dispatch.undisturbed`.
    """

    def __init__(self, key: Tensor, value: Tensor, gate: Any, mask: Tensor | None, impl: str) -> None:
        self._held, self._impl = (key, value, gate, mask), impl

    def __call__(self, query: Tensor, base: Tensor, scale: float | None, overwrite: bool = False) -> Tensor | None:
        """(B, T, H, d), or None where no full call of this kind has been made, or none with gradients."""
        key, value, gate, mask = self._held
        if type(query) is not Tensor or type(base) is not Tensor or not dispatch.whole((query, *self._held, base)):
            return None
        kind = scale, _kind(query), _kind(base), *_held(key, value, gate, mask, self._impl)
        if (kernels := _KERNELS.get(kind)) is None:
            return None
        inputs = query, key, value, gate, base, mask
        if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in inputs):
            return None  # re-entrant checkpoints ask for no gradients in between
        return _Short.apply(kernels, *inputs, scale, kernels.backend)  # type: ignore[no-any-return]

    @staticmethod
    def after(inputs: Inputs, scale: float | None, impl: str) -> None:
        """Keep what the calls that follow one with these arguments need, where they need no full one."""
        query, key, value, gate, base, mask = inputs
        if key.numel() == 0 or not dispatch.unprofiled(inputs) or (backend := _backend(inputs, impl)) is None:
            return
        if any(torch.empty_like(tensor).stride(-1) != 1 for tensor in (query, key, value)):
            return  # rows that overlap: a gradient's layout would be another
        if len(_KERNELS) >= MOST_KINDS:
            _KERNELS.clear()
        kind = scale, _kind(query), _kind(base), *_held(key, value, gate, mask, impl)
        kernels = _Kernels(inputs, scale, backend)
        if kernels.attention is not None:
            _KERNELS[kind] = kernels


Ready = RepeatedDecode | RepeatedTraining


def ready(
    again: RepeatedDecode | None, key: Tensor, value: Tensor, gate: Any, mask: Tensor | None, impl: str
) -> Ready | None:
    """What may answer a layer's next call, ``again`` being what the last one left; None where only a full call may.

    The caller has asked :func:`layalign.ops.dispatch.undisturbed`.
    """
    if not torch.is_grad_enabled():
        return again if again is not None and again.prepare(key, value, gate, mask, impl) else None
    return RepeatedTraining(key, value, gate, mask, impl) if key.is_cpu or key.is_cuda else None


def after(tried: Ready | None, inputs: Inputs, scale: float | None, impl: str) -> RepeatedDecode | None:
    """What a full call with these arguments leaves for the layer's next one; ``tried`` did not answer it."""
    if isinstance(tried, RepeatedTraining):
        RepeatedTraining.after(inputs, scale, impl)
    return RepeatedDecode.after(inputs, scale, impl)
