"""Gated cross-attention again and again, with other tensors of the same kind: what one call found is kept.

The counterparts of those in ``layalign/ops/_repeated_cpp.py``, which ``layalign/ops/_repeated.py`` takes by the same
names; there it is decided which calls are of the same kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from layalign_kernels.common import dot_precision
from layalign_kernels.gated_cross_attention import forward_launch
from layalign_kernels.gated_cross_attention_backward import Memory, backward_launches, splits_for
from layalign_kernels.gated_decode import decode_launches
from layalign_kernels.launching import Launch, Repeated, can_repeat

__all__ = ["RepeatedAttention", "can_repeat", "repeated_decode"]

Tensors = Sequence["torch.Tensor | None"]  # query, key, value, gate, base, mask
Needs = tuple[bool, bool, bool, bool]


def _kept(launches: Sequence[Launch]) -> list[Repeated] | None:
    """All of them, or None."""
    found = []
    for launch in launches:
        one = Repeated.of(launch)
        if one is None:
            return None
        found.append(one)
    return found


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def repeated_decode(
    inputs: Tensors, scale: float | None, out: torch.Tensor
) -> Callable[[int, int, int, int], bool] | None:
    """The decoding kernel with key, value and mask held by the caller.

    Returns:
        A function of the addresses of query, gate, base and result, which says whether it launched; or None where only
        Triton launches.
    """
    query, key, value, gate, base, mask = inputs
    assert query is not None and key is not None and value is not None and gate is not None
    precision = dot_precision(query.dtype)
    with torch.cuda.device_of(query):
        launches = decode_launches(query, key, value, gate, base, mask, scale, out)
        kept = _kept(launches)
    if kept is None:
        return None
    at_key, at_value, at_mask = map(_address, (key, value, mask))
    first, *then = kept
    part, device, dtype = launches[0].arguments["p_part"], query.device, query.dtype
    shape = None if part is None else (part.shape[0], part.shape[1], part.shape[2] + 1)  # with the log-sum-exp behind

    def run(at_query: int, at_gate: int, at_base: int, at_out: int) -> bool:
        at_part = at_lse = None
        if shape is not None:
            scratch = torch.empty(shape, dtype=torch.float32, device=device)
            at_part = scratch.data_ptr()
            at_lse = at_part + 4 * shape[0] * shape[1] * (shape[2] - 1)
        own = at_query, at_key, at_value, at_gate, at_base, at_mask, at_out, at_part, at_lse
        if not first.fits(own) or dot_precision(dtype) != precision:
            return False
        combine = at_part, at_lse, at_gate, at_base, at_out
        if then and not then[0].fits(combine):
            return False
        first(own)
        if then:
            then[0](combine)
        return True

    return run


class RepeatedAttention:
    """Forward and backward for tensors of one kind, all on one device and with last strides of one."""

    def __init__(self, inputs: Tensors, scale: float | None) -> None:
        query, key, value, gate, base, mask = inputs
        assert query is not None and key is not None and value is not None and gate is not None and base is not None
        self._scale, self._device, self._dtype = scale, query.device, query.dtype
        self._precision = dot_precision(query.dtype)
        self._out = base.shape
        self._splits = splits_for(query, key)
        self._backward: dict[Needs, list[Repeated] | None] = {}
        with torch.cuda.device_of(query):
            found = _kept([forward_launch(query, key, value, gate, base, mask, scale, *self.results())])
        self._forward = None if found is None else found[0]

    def __bool__(self) -> bool:
        """Whether it can be launched at all."""
        return self._forward is not None

    def results(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Fresh memory for the forward's: out (B, T, H, d) in the query's dtype, log-sum-exp (B, H, T) fp32."""
        batch, length, heads, _ = self._out
        out = torch.empty(self._out, dtype=self._dtype, device=self._device)
        return out, torch.empty((batch, heads, length), dtype=torch.float32, device=self._device)

    def forward(self, inputs: Tensors) -> tuple[torch.Tensor, torch.Tensor] | None:
        """As ``gated_cross_attention_forward``, or None where it must be called instead."""
        out, lse = self.results()
        addresses = [_address(tensor) for tensor in (*inputs, out, lse)]
        assert self._forward is not None
        if not self._forward.fits(addresses) or dot_precision(self._dtype) != self._precision:
            return None
        self._forward(addresses)
        return out, lse

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
                self._backward[needs] = _kept(backward_launches(*arguments))
        kept = self._backward[needs]
        if kept is None or dot_precision(self._dtype) != self._precision:
            return None
        head = [_address(tensor) for tensor in (query, key, value, gate, mask, lse)]
        at_grad, delta = grad.data_ptr(), _address(memory.delta)
        calls = []
        if memory.dgate is not None:
            calls.append([*head, at_grad, _address(memory.dq), delta, memory.dgate.data_ptr()])
        if memory.dk is not None or memory.dv is not None:
            calls.append([*head, delta, at_grad, _address(memory.dk), _address(memory.dv)])
        if not all(launch.fits(addresses) for launch, addresses in zip(kept, calls, strict=True)):
            return None
        for launch, addresses in zip(kept, calls, strict=True):
            launch(addresses)
        return memory.gradients(key, gate, needs)
