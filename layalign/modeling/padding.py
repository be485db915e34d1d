"""Adapter and aligner compute real source tokens only: padding is removed before them, and restored as zeros after."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layalign.nn.rows import Rows

WORTHWHILE = 0.95  # share of real tokens up to which the copies cost less than the products they save

STACKED = 2**23  # bytes of a tensor, from which a copy takes a GPU longer than some launches: counted, not measured


def real_tokens(mask: Tensor, index: Tensor | None = None) -> Rows | None:
    """The real tokens of a (B, S) mask; None if it is cheaper to compute all.

    Args:
        mask: (B, S), 1 where a token is real.
        index: (N,) int64, their positions in the flattened mask, if the caller knows them. Otherwise the host waits for
            the device once.
    """
    if torch.compiler.is_compiling():
        return None
    rows = Rows(mask.bool()) if index is None else Rows.at(mask.shape, index)
    return rows if 0 < len(rows) <= WORTHWHILE * mask.numel() else None


def spread_heads(rows: Rows, states: Tensor) -> Tensor:
    """(..., 1, G, N, d) -> (..., B, G, S, d), in the memory order of (B, S, G, d) as before; zeros in the padding."""
    packed = states.transpose(-3, -2).squeeze(-4)  # (..., N, G, d)
    batch = packed.new_zeros((*packed.shape[:-3], rows.shape.numel(), *packed.shape[-2:]))
    batch.index_copy_(batch.dim() - 3, rows.index_on(packed.device), packed)
    return batch.unflatten(-3, rows.shape).transpose(-3, -2)


def spread_all(rows: Rows, states: list[Tensor] | Tensor) -> Sequence[Tensor]:
    """:func:`spread_heads` of each. A list is empty afterwards: its memory is free before that of the result is taken.

    On a GPU small ones of one shape are spread at once, in few launches. That writes them once more.
    """
    if isinstance(states, list):
        if states[0].is_cpu or states[0].nbytes > STACKED or len({each.shape for each in states}) > 1:
            return [spread_heads(rows, each) for each in states]
        stacked = torch.stack([each.transpose(1, 2) for each in states]).transpose(2, 3)
        states.clear()
        states = stacked
    return spread_heads(rows, states).unbind(0)
