"""Layer mix and projections for a group of slots at a time, with one result tensor per slot: the model's way on a CPU.

    y[j] = x[j] @ W[j].T + c[j],   W[j] = W2, c[j] = b2            (the aligner's projection)
                                   W[j] = Wk @ W2, c[j] = Wk @ b2 + bk   (folded, :mod:`layalign.modeling.key_values`)
    k[j] = y[j] @ Wk.T + bk        (in two steps, where folding does not pay: Wk is the LLM's own and frozen)

x, y and the gradients of x, W[j] and y never exist for all slots at once. The forward mixes a group of slots,
multiplies it and frees it; the backward mixes it again. On a CPU that is faster too: a group of x stays in the caches,
and one slot's product fills the cores. Tens of megabytes for all slots would come fresh from the system in every step.
On a GPU one launch for all slots is faster: :func:`layalign.ops.layer_projection`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layalign.ops import batched_linear, checks, packed_weight
from layalign.ops.layer_mix import layer_mix
from layalign.ops.packed_weight import PackedWeight

Map = tuple[Tensor, Tensor | None]  # weight (N, K) and bias (N,) of a linear map

GROUP_BYTES = 2**24  # of x in a group: fits a third-level cache


def can_run(hidden: Sequence[Tensor], impl: str) -> bool:
    """Whether a call may be made in groups: on a CPU, outside of compilation and functional transforms."""
    if torch.compiler.is_compiling() or checks.transforming():
        return False
    return hidden[0].device.type == "cpu" and impl != "torch"


def packable(hidden: Sequence[Tensor], columns: int, impl: str) -> bool:
    """Whether folded maps (2L, columns, D_e) should be packed for the C++ kernel, where no gradients are needed."""
    return impl in ("auto", "cpp") and packed_weight.serves(hidden, columns) and checks.can_read_memory(hidden)


def differentiated(tensors: Iterable[Tensor | None]) -> bool:
    """Whether autograd records a call with these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def grouped_projection(
    hidden: Sequence[Tensor],
    mix: Map,
    inner: Map,
    folded: tuple[Tensor | PackedWeight, Tensor | None] | None = None,
    outer: Sequence[Map] = (),
    *,
    size: int | None = None,
    impl: str = "auto",
) -> Sequence[Tensor]:
    """2L tensors (B, S, D_out), differentiable in ``hidden``, ``mix`` and ``inner``.

    Args:
        hidden: E tensors (B, S, D_e).
        mix: fc1's weight (2L, E) and bias (2L,) or None.
        inner: fc2's weight W2 (D_l, D_e) and bias b2 (D_l,) or None.
        folded: weight (2L, D_out, D_e) and bias (2L, D_out) or None, instead of W2 and b2. A packed weight is for calls
            without gradients.
        outer: 2L frozen maps (D_out, D_l): those that were folded, or, without ``folded``, those to apply to y.
        size: d, to get (B, D_out / d, S, d). As views made here, autograd does not record them one by one.
        impl: backend of the layer mix.

    Source: LayAlign, layer-wise aligner; gradients: dW2 = sum_j (dy[j].T @ x[j]), each led by Wk.T where folded.
    """
    hidden = checks.autocast(hidden)
    weight, bias = (None, None) if folded is None else folded
    call = _Call(impl, weight, bias, outer, size)
    inputs = *mix, *inner, *hidden
    direct = checks.can_read_memory(inputs) and not differentiated(inputs)
    return call.as_heads(_forward(call, *inputs)) if direct else list(_Grouped.apply(call, *inputs))  # type: ignore[arg-type]


def heads(states: Tensor, size: int) -> Tensor:
    """(..., S, G * d) -> (..., G, S, d), a view."""
    return states.view(*states.shape[:-1], -1, size).transpose(-3, -2)


class _Call:
    """A call's arguments without gradients."""

    def __init__(
        self,
        impl: str,
        weight: Tensor | PackedWeight | None,
        bias: Tensor | None,
        outer: Sequence[Map],
        size: int | None,
    ) -> None:
        self.impl, self.weight, self.bias, self.outer, self.size = impl, weight, bias, outer, size
        self.frozen = tuple(weight for weight, _ in outer)  # saved for the backward
        self.in_two_steps = weight is None and len(outer) > 0
        self.kernel = impl in ("auto", "cpp")

    def as_heads(self, states: Sequence[Tensor] | Tensor) -> Sequence[Tensor]:
        """Results (B, S, D_out) per slot, as heads where ``size`` is given."""
        if isinstance(states, Tensor):
            return (states if self.size is None else heads(states, self.size)).unbind(0)
        return states if self.size is None else [heads(state, self.size) for state in states]

    def as_rows(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of what :meth:`as_heads` returned, (B, S, D_out)."""
        if self.size is None:
            return list(grads)
        return [None if grad is None else grad.transpose(1, 2).flatten(2) for grad in grads]

    def through(self, y: Sequence[Tensor] | Tensor, first: int = 0) -> Sequence[Tensor] | Tensor:
        """y (B, S, D_l) of the slots from ``first`` on through their outer maps, if there are any; y is freed."""
        if not self.in_two_steps:
            return y
        y = list(y)
        for group in _groups(y, len(y)):
            maps = self.outer[first + group.start : first + group.stop]
            weights, biases = zip(*(_as(y[0].dtype, *each) for each in maps), strict=True)
            y[group] = batched_linear.forward(y[group], weights, biases, self.kernel)
        return y

    def back(self, grads: Sequence[Tensor | None], first: int, rows: int) -> Tensor:
        """The gradients of y (slots, rows, D_l) from those of what :meth:`through` returned, zeros for None."""
        like = next(grad for grad in grads if grad is not None)
        weights = [weight.to(like.dtype) for weight in self.frozen[first : first + len(grads)]]
        found = like.new_empty((len(grads), rows, weights[0].shape[1]))
        return batched_linear.backward(grads, weights, found, self.kernel)

    def packed(
        self, hidden: Sequence[Tensor], slots: int, inner: Tensor, inner_bias: Tensor | None
    ) -> tuple[Tensor | PackedWeight, Tensor | None] | None:
        """(weight, bias) for the C++ kernel, which mixes and multiplies at once; None where it is not used."""
        if isinstance(self.weight, PackedWeight):
            return self.weight, self.bias
        weight, bias = (inner, inner_bias) if self.weight is None else (self.weight, self.bias)
        weight, bias = _as(hidden[0].dtype, weight, bias)
        served = self.kernel and packed_weight.serves(hidden, weight.shape[-2])
        if not served or not checks.can_read_memory((*hidden, weight, bias)):
            return None
        return (weight, bias) if packed_weight.pays(hidden, weight, slots) else None

    def products(self, x: Tensor, group: slice) -> list[Tensor]:
        """x (slots, B, S, D_e) of a group by the folded maps."""
        assert isinstance(self.weight, Tensor)  # a packed one is used without gradients only
        weight, bias = _as(x.dtype, self.weight[group], None if self.bias is None else self.bias[group])
        biases = [None] * len(x) if bias is None else bias.unbind(0)
        return batched_linear.forward(x.unbind(0), weight.unbind(0), biases, self.kernel)

    def maps(self, group: slice, inner: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
        """W[j] of a group in the dtype of x."""
        if self.weight is None:
            return [inner.to(dtype)] * (group.stop - group.start)
        assert isinstance(self.weight, Tensor)
        return self.weight[group].to(dtype).unbind(0)


def _as(dtype: torch.dtype, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _groups(hidden: Sequence[Tensor], slots: int) -> Iterator[slice]:
    each = hidden[0].numel() * hidden[0].element_size()
    step = max(1, min(slots, GROUP_BYTES // max(each, 1)))
    return (slice(begin, min(begin + step, slots)) for begin in range(0, slots, step))


class _InnerSums:
    """dW2 and db2, group by group; summed in fp32 at least."""

    def __init__(self, call: _Call, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._call = call
        wide = torch.promote_types(dtype, torch.float32)
        self._weight = None if weight is None else weight.new_zeros((weight.shape[1], weight.shape[0]), dtype=wide)
        self._bias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        self._folded: Tensor | None = None  # one slot's gradient of its folded weight

    @property
    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """dW2 (D_l, D_e) and db2 (D_l)."""
        return None if self._weight is None else self._weight.T, self._bias

    def add(self, grads: Sequence[Tensor | None], x: Tensor, group: slice, inner: Tensor) -> Tensor:
        """Add what a group contributes, with its x (slots, B, S, D_e).

        Args:
            grads: gradients of the results (B, S, D_out), one per slot; None where a result was not used.
            inner: W2.

        Returns:
            The gradients of x.
        """
        found, call = torch.empty_like(x), self._call
        if call.in_two_steps:
            dy = call.back(grads, group.start, x[0, ..., 0].numel())
            batched_linear.backward([dy], [inner.to(x.dtype)], found.view(1, -1, x.shape[-1]), call.kernel)
            if self._bias is not None:
                self._bias += dy.sum(dim=(0, 1), dtype=self._bias.dtype)
            if self._weight is not None:
                packed_weight.add_weight_gradient(self._weight, dy.unbind(0), x)
            return found
        folded = call.weight is not None
        batched_linear.backward(grads, call.maps(group, inner, x.dtype), found.flatten(1, 2), call.kernel)
        for slot, grad in enumerate(grads, group.start):
            if self._bias is not None and grad is not None:
                column = grad.sum(dim=(0, 1), dtype=self._bias.dtype)
                self._bias += column @ call.frozen[slot].to(column.dtype) if folded else column
        if self._weight is not None and not folded:
            packed_weight.add_weight_gradient(self._weight, grads, x)
        elif self._weight is not None:
            self._add_folded(self._weight, grads, x, group.start)
        return found

    def _add_folded(self, weight: Tensor, grads: Sequence[Tensor | None], x: Tensor, first: int) -> None:
        """Add to dW2 through each slot's outer map."""
        for place, grad in enumerate(grads):
            if grad is None:
                continue
            if self._folded is None:
                self._folded = weight.new_empty((x.shape[-1], grad.shape[-1]))
            packed_weight.add_weight_gradient(self._folded.zero_(), [grad], x[place : place + 1])
            weight.addmm_(self._folded, self._call.frozen[first + place].to(weight.dtype))


class _Mixed:
    """The layer mix again, group by group, and the gradients of (weight, bias, *hidden) where they are needed."""

    def __init__(self, inputs: Sequence[Tensor | None], needs: Sequence[bool], impl: str) -> None:
        self._inputs, self._needs, self._impl = inputs, needs, impl
        self._totals = [
            torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) if t is not None and need else None
            for t, need in zip(inputs, needs, strict=True)
        ]

    @property
    def gradients(self) -> list[Tensor | None]:
        """In the inputs' dtypes; summed over the groups in fp32 at least."""
        pairs = zip(self._totals, self._inputs, strict=True)
        return [None if total is None or t is None else total.to(t.dtype) for total, t in pairs]

    def again(self, group: slice) -> Tensor:
        """x of a group, (slots, B, S, D_e)."""
        weight, bias, *hidden = self._inputs
        assert weight is not None
        parts = weight[group], None if bias is None else bias[group], *hidden
        self._leaves = [
            None if part is None else part.detach().requires_grad_(need)
            for part, need in zip(parts, self._needs, strict=True)
        ]
        with torch.enable_grad():
            self._x = layer_mix(self._leaves[2:], self._leaves[0], self._leaves[1], impl=self._impl)  # type: ignore[arg-type]
        return self._x.detach()

    def backward(self, group: slice, grad: Tensor) -> None:
        """Add to the inputs' gradients, from ``grad`` of the x that :meth:`again` returned last."""
        wanted = [i for i, total in enumerate(self._totals) if total is not None]
        if wanted:
            leaves = [leaf for i in wanted if (leaf := self._leaves[i]) is not None]
            for i, part in zip(wanted, torch.autograd.grad(self._x, leaves, grad), strict=True):
                total = self._totals[i]
                assert total is not None
                total[group if i < 2 else slice(None)] += part


def _forward(
    call: _Call,
    mix_weight: Tensor,
    mix_bias: Tensor | None,
    inner: Tensor,
    inner_bias: Tensor | None,
    *hidden: Tensor,
) -> Sequence[Tensor] | Tensor:
    packed = call.packed(hidden, len(mix_weight), inner, inner_bias)
    if packed is not None:
        return call.through(packed_weight.project(hidden, mix_weight, mix_bias, *packed))
    found: list[Tensor] = []
    for group in _groups(hidden, len(mix_weight)):
        part_bias = None if mix_bias is None else mix_bias[group]
        x = layer_mix(hidden, mix_weight[group], part_bias, impl=call.impl)
        if call.weight is None:
            found += call.through(F.linear(x, *_as(x.dtype, inner, inner_bias)).unbind(0), group.start)
        else:
            found += call.products(x, group)
    return found


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Any) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *call.frozen)
        return tuple(call.as_heads(_forward(call, *inputs)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        mix_weight, mix_bias, inner, inner_bias, *others = ctx.saved_tensors
        hidden, ctx.call.frozen = others[: len(ctx.needs_input_grad) - 5], others[len(ctx.needs_input_grad) - 5 :]
        _, need_mix, need_mix_bias, need_inner, need_inner_bias, *needs_hidden = ctx.needs_input_grad
        mixed = _Mixed((mix_weight, mix_bias, *hidden), (need_mix, need_mix_bias, *needs_hidden), ctx.call.impl)
        dtype = hidden[0].dtype
        sums = _InnerSums(ctx.call, inner if need_inner else None, inner_bias if need_inner_bias else None, dtype)
        with checks.without_autocast(hidden[0]):
            for group in _groups(hidden, len(mix_weight)):
                x = mixed.again(group)
                parts = [None if grad is None else grad.to(dtype) for grad in ctx.call.as_rows(grads[group])]
                if any(grad is not None for grad in parts):
                    mixed.backward(group, sums.add(parts, x, group, inner))
        found = mixed.gradients
        pairs = zip(sums.gradients, (inner, inner_bias), strict=True)
        inner_grads = (None if grad is None else grad.to(p.dtype) for grad, p in pairs)
        return (None, *found[:2], *inner_grads, *found[2:])
