"""Adapter and aligner compute real source tokens only: padding is removed before them, and restored as zeros after."""

from __future__ import annotations

import torch
from torch import Tensor

from layalign.nn.rows import Rows

WORTHWHILE = 0.95  # share of real tokens up to which the copies cost less than the products they save


def real_tokens(mask: Tensor) -> Rows | None:
    """The real tokens of a (B, S) mask; None if it is cheaper to compute all. Waits for the device once."""
    if torch.compiler.is_compiling():
        return None
    rows = Rows(mask.bool())
    return rows if 0 < len(rows) <= WORTHWHILE * mask.numel() else None


def spread_heads(rows: Rows, states: Tensor) -> Tensor:
    """(1, G, N, d) -> (B, G, S, d), in the memory order of (B, S, G, d) as before; zeros in the padding."""
    return rows.spread(states.transpose(1, 2)).transpose(1, 2)
