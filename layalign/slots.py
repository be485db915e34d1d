"""Layer mix and projection a few slots at a time, each slot's result a tensor of its own: the model's way on a CPU.

    y[j] = x[j] @ W[j].T + c[j],   W[j] = W2, c[j] = b2            (the aligner's projection)
                                   W[j] = Wk @ W2, c[j] = Wk @ b2 + bk   (folded, :mod:`layalign.fold`)

Neither x nor the gradients of x, W[j] and y are ever whole in memory: a group of slots is mixed, multiplied and
forgotten, in the forward and, mixed again, in the backward. On a CPU that is faster too: a group of x stays in the
caches, one slot's product fills the cores as well as a batch of them, and memory of tens of megabytes would come fresh
from the system in every step. On a GPU one launch for all slots is better: :func:`layalign.ops.layer_projection`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layalign import ops
from layalign._plain import has_hooks, reason_against_reading
from layalign.nn.aligner import WeightedLinearProjector
from layalign.ops import _checks

GROUP_BYTES = 2**24  # of x at once: stays in a third-level cache
FEW_ROWS = 256  # below them, one slot's product does not fill the cores


def useful(projector: WeightedLinearProjector, hidden: Sequence[Tensor]) -> bool:
    """Whether the model should go by slots: on a CPU, where the projector's weights may be read."""
    if torch.compiler.is_compiling() or hidden[0].device.type != "cpu" or projector.impl == "torch":
        return False
    if projector.structure != "Linear" or has_hooks(projector) or "forward" in projector.__dict__:
        return False
    return all(reason_against_reading(linear) is None for linear in (projector.fc1, projector.fc2))


def project(
    projector: WeightedLinearProjector,
    hidden: Sequence[Tensor],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    outer: Sequence[nn.Linear] = (),
) -> list[Tensor]:
    """2L tensors (B, S, D_out), differentiable in the projector's parameters and in ``hidden``.

    Args:
        hidden: E tensors (B, S, D_e).
        weight, bias: folded, (2L, D_out, D_e) and (2L, D_out) or None; by default the projector's own for every slot.
        outer: with ``weight``, the 2L frozen maps that were folded into it.

    Source: LayAlign, layer-wise aligner; gradients: dW2 = sum_j (dy[j].T @ x[j]), each led by Wk.T where folded.
    """
    fc1, fc2 = projector.fc1, projector.fc2
    hidden = _checks.autocast(hidden)
    kept = _Kept(projector.impl, weight, bias, outer)
    return list(_Slots.apply(kept, fc1.weight, fc1.bias, fc2.weight, fc2.bias, *hidden))


class _Kept:
    """What a call keeps beside its tensors with gradients."""

    def __init__(self, impl: str, weight: Tensor | None, bias: Tensor | None, outer: Sequence[nn.Linear]) -> None:
        self.impl, self.weight, self.bias, self.outer = impl, weight, bias, outer

    def products(self, x: Tensor, group: slice) -> list[Tensor]:
        """x (slots, B, S, D_e) of a group by the folded maps."""
        if x[0, ..., 0].numel() >= FEW_ROWS:
            return [F.linear(each, *self.map(slot, x.dtype)) for slot, each in enumerate(x.unbind(0), group.start)]
        assert self.weight is not None
        weight, bias = _as(x.dtype, self.weight[group], None if self.bias is None else self.bias[group])
        rows, flat = weight.mT, x.flatten(1, 2)
        y = torch.bmm(flat, rows) if bias is None else torch.baddbmm(bias[:, None], flat, rows)
        return list(y.unflatten(1, x.shape[1:3]).unbind(0))

    def map(self, slot: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The folded (W[j], c[j]) in the dtype of x."""
        assert self.weight is not None
        return _as(dtype, self.weight[slot], None if self.bias is None else self.bias[slot])


def _as(dtype: torch.dtype, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _groups(hidden: Sequence[Tensor], slots: int) -> Iterator[slice]:
    each = hidden[0].numel() * hidden[0].element_size()
    step = max(1, min(slots, GROUP_BYTES // max(each, 1)))
    return (slice(begin, min(begin + step, slots)) for begin in range(0, slots, step))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, the sum in the dtype of ``total``."""
    if left.dtype == right.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left.to(right.dtype) @ right)


class _InnerSums:
    """dW2 and db2, slot by slot; summed in fp32 at least."""

    def __init__(self, kept: _Kept, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._outer = kept.outer
        wide = torch.promote_types(dtype, torch.float32)
        self.weight = None if weight is None else torch.zeros_like(weight, dtype=wide)
        self.bias = None if bias is None else torch.zeros_like(bias, dtype=wide)

    def add(self, grad: Tensor, x: Tensor, weight: Tensor, slot: int | None = None) -> Tensor:
        """Take y's gradient (..., D_out) with its x (..., D_e) into account; returns x's gradient, grad @ weight.

        Args:
            slot: of a folded weight, whose outer map the sums pass through; None for the projector's own.
        """
        rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        outer = None if slot is None else self._outer[slot].weight
        if self.weight is not None and outer is None:
            _add_product(self.weight, rows.T, inputs)
        elif self.weight is not None and outer is not None:
            _add_product(self.weight, outer.T, rows.T @ inputs)
        if self.bias is not None:
            column = rows.sum(dim=0, dtype=self.bias.dtype)
            self.bias += column if outer is None else column @ outer.to(column.dtype)
        return (rows @ weight).view_as(x)


class _Mixed:
    """The layer mix once more, group by group, and the gradients of (weight, bias, *hidden) where they are needed."""

    def __init__(self, inputs: Sequence[Tensor | None], needs: Sequence[bool], impl: str) -> None:
        self._inputs, self._needs, self._impl = inputs, needs, impl
        self.totals = [None if t is None or not n else torch.zeros_like(t) for t, n in zip(inputs, needs, strict=True)]

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
            self._x = ops.layer_mix(self._leaves[2:], self._leaves[0], self._leaves[1], impl=self._impl)  # type: ignore[arg-type]
        return self._x.detach()

    def backward(self, group: slice, grad: Tensor) -> None:
        """Add what ``grad`` of the x just returned means for the inputs."""
        wanted = [i for i, total in enumerate(self.totals) if total is not None]
        if wanted:
            leaves = [leaf for i in wanted if (leaf := self._leaves[i]) is not None]
            for i, part in zip(wanted, torch.autograd.grad(self._x, leaves, grad), strict=True):
                total = self.totals[i]
                assert total is not None
                total[group if i < 2 else slice(None)] += part


class _Slots(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kept: _Kept,
        mix_weight: Tensor,
        mix_bias: Tensor | None,
        inner: Tensor,
        inner_bias: Tensor | None,
        *hidden: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.kept = kept
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mix_weight, mix_bias, inner, inner_bias, *hidden)
        found: list[Tensor] = []
        for group in _groups(hidden, len(mix_weight)):
            part_bias = None if mix_bias is None else mix_bias[group]
            x = ops.layer_mix(hidden, mix_weight[group], part_bias, impl=kept.impl)
            if kept.weight is None:
                found += F.linear(x, *_as(x.dtype, inner, inner_bias)).unbind(0)
                continue
            found += kept.products(x, group)
        return tuple(found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        mix_weight, mix_bias, inner, inner_bias, *hidden = ctx.saved_tensors
        _, need_mix, need_mix_bias, need_inner, need_inner_bias, *needs_hidden = ctx.needs_input_grad
        mixed = _Mixed((mix_weight, mix_bias, *hidden), (need_mix, need_mix_bias, *needs_hidden), ctx.kept.impl)
        dtype = hidden[0].dtype
        sums = _InnerSums(ctx.kept, inner if need_inner else None, inner_bias if need_inner_bias else None, dtype)
        with _checks.without_autocast(hidden[0]):
            for group in _groups(hidden, len(mix_weight)):
                x = mixed.again(group)
                parts = grads[group]
                if ctx.kept.weight is None:  # one product for the whole group
                    like = next((grad for grad in parts if grad is not None), None)
                    if like is not None:
                        whole = [torch.zeros_like(like) if grad is None else grad for grad in parts]
                        mixed.backward(group, sums.add(torch.stack(whole).to(dtype), x, inner.to(dtype)))
                    continue
                x_grad = torch.zeros_like(x)
                for place, (slot, grad) in enumerate(zip(range(len(mix_weight))[group], parts, strict=True)):
                    if grad is not None:
                        x_grad[place] = sums.add(grad.to(dtype), x[place], ctx.kept.map(slot, dtype)[0], slot)
                mixed.backward(group, x_grad)
        found = mixed.totals
        inner_grads = (None if g is None else g.to(p.dtype) for g, p in ((sums.weight, inner), (sums.bias, inner_bias)))
        return (None, *found[:2], *inner_grads, *found[2:])
