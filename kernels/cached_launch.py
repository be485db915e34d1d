"""Cached launches of gated cross-attention, for calls with other tensors of the same kind.

``layalign/ops/cached_launch.py`` decides which calls are of the same kind. The names are those of
``layalign/ops/cached_launch_cpp.py``, the same for the C++ kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from layalign_kernels.common import dot_precision
from layalign_kernels.gated_cross_attention import forward_launch
from layalign_kernels.gated_cross_attention_backward import Memory, backward_launches, splits_for
from layalign_kernels.gated_cross_attention_decode import decode_launches
from layalign_kernels.launch import CachedLaunch, Launch, can_cache_launches

IN_PLACE = False  # decoding must not write its result to the base
__all__ = ["IN_PLACE", "cached_attention", "cached_decode", "can_cache_launches"]

Tensors = Sequence["torch.Tensor | None"]  # query, key, value, gate, base, mask
Needs = tuple[bool, bool, bool, bool]


class _Launches:
    """Launches that are made all or none."""

    def __init__(self, kept: Sequence[CachedLaunch], dtype: torch.dtype) -> None:
        self._kept, self._dtype, self._precision = kept, dtype, dot_precision(dtype)

    @staticmethod
    def of(launches: Sequence[Launch], dtype: torch.dtype) -> _Launches | None:
        """For tensors of ``dtype`` on the current device; None where Triton must make one of the launches."""
        kept = [one for launch in launches if (one := CachedLaunch.of(launch)) is not None]
        return _Launches(kept, dtype) if len(kept) == len(launches) else None

    def __call__(self, *calls: Sequence[int | None]) -> bool:
        """Launch each at its sequence of addresses; False where one does not fit and nothing was launched."""
        pairs = list(zip(self._kept, calls, strict=True))
        if dot_precision(self._dtype) != self._precision or not all(one.fits(at) for one, at in pairs):
            return False
        for one, at in pairs:
            one(at)
        return True


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def cached_decode(
    inputs: Tensors, scale: float | None, out: torch.Tensor
) -> Callable[[int, int, int, int], bool] | None:
    """The decoding kernel. The caller keeps key, value and mask alive.

    Returns:
        A function of the addresses of query, gate, base and result, which returns whether it launched; None where
        Triton must launch.
    """
    query, key, value, gate, base, mask = inputs
    assert query is not None and key is not None and value is not None and gate is not None
    with torch.cuda.device_of(query):
        launches = decode_launches(query, key, value, gate, base, mask, scale, out)
        together = _Launches.of(launches, query.dtype)
    if together is None:
        return None
    at_key, at_value, at_mask = map(_address, (key, value, mask))
    part, device = launches[0].arguments["p_part"], query.device
    shape = None if part is None else (part.shape[0], part.shape[1], part.shape[2] + 1)  # with room for the log-sum-exp

    def run(at_query: int, at_gate: int, at_base: int, at_out: int) -> bool:
        at_part = at_lse = None
        if shape is not None:
            scratch = torch.empty(shape, dtype=torch.float32, device=device)
            at_part = scratch.data_ptr()
            at_lse = at_part + 4 * shape[0] * shape[1] * (shape[2] - 1)
        own = at_query, at_key, at_value, at_gate, at_base, at_mask, at_out, at_part, at_lse
        return together(own) if shape is None else together(own, (at_part, at_lse, at_gate, at_base, at_out))

    return run


def cached_attention(
    inputs: Tensors, scale: float | None, out: torch.Tensor, lse: torch.Tensor
) -> CachedAttention | None:
    """Forward and backward for tensors of one kind, or None where Triton must launch."""
    query, key, value, gate, base, mask = inputs
    assert query is not None and key is not None and value is not None and gate is not None
    with torch.cuda.device_of(query):
        launch = forward_launch(query, key, value, gate, base, mask, scale, out, lse)
        together = _Launches.of([launch], query.dtype)
    return None if together is None else CachedAttention(together, scale, splits_for(query, key))


class CachedAttention:
    """Forward and backward for tensors of one kind, all on one device and with last strides of one."""

    def __init__(self, forward: _Launches, scale: float | None, splits: int) -> None:
        self._forward, self._scale, self._splits = forward, scale, splits
        self._backward: dict[Needs, _Launches | None] = {}

    def forward(self, inputs: Tensors, out: torch.Tensor, lse: torch.Tensor) -> bool:
        """Into ``out`` (B, T, H, d) and ``lse`` (B, H, T) fp32; False where nothing was launched."""
        return self._forward([_address(tensor) for tensor in (*inputs, out, lse)])

    def backward(self, saved: Tensors, grad: torch.Tensor, needs: Needs) -> tuple[torch.Tensor | None, ...] | None:
        """As ``gated_cross_attention_backward``, or None where it must be called instead.

        Args:
            saved: query, key, value, gate, mask and log-sum-exp.
        """
        query, key, value, gate, mask, lse = saved
        assert query is not None and key is not None and value is not None and gate is not None and lse is not None
        memory = Memory.of(query, key, needs, self._splits)
        if needs not in self._backward:
            arguments = grad, query, key, value, gate, mask, lse, self._scale, memory, self._splits
            with torch.cuda.device_of(query):
                self._backward[needs] = _Launches.of(backward_launches(*arguments), query.dtype)
        together = self._backward[needs]
        head = [_address(tensor) for tensor in (query, key, value, gate, mask, lse)]
        at_grad, delta = grad.data_ptr(), _address(memory.delta)
        calls = []
        if memory.dgate is not None:
            calls.append([*head, at_grad, _address(memory.dq), delta, memory.dgate.data_ptr()])
        if memory.dk is not None or memory.dv is not None:
            calls.append([*head, delta, at_grad, _address(memory.dk), _address(memory.dv)])
        return memory.gradients(key, gate, needs) if together is not None and together(*calls) else None
