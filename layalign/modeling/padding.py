"""Adapter and aligner see real source tokens only: padding is taken out before them and put back, as zeros, behind."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WORTHWHILE = 0.95  # share of real tokens up to which the copies cost less than the products they save


@dataclass(frozen=True)
class RealTokens:
    """Which of B * S tokens are real.

    Attributes:
        shape: (B, S).
        rows: (N,) int64, their places in a (B * S, ...) tensor.
    """

    shape: tuple[int, int]
    rows: Tensor

    def pack(self, states: Tensor) -> Tensor:
        """(B, S, D) -> (1, N, D)."""
        return states.flatten(0, 1).index_select(0, self.rows.to(states.device))[None]

    def unpack(self, states: Tensor) -> Tensor:
        """(1, N, ...) -> (B, S, ...), zeros where no token is."""
        batch, length = self.shape
        whole = states.new_zeros((batch * length, *states.shape[2:]))
        return whole.index_copy(0, self.rows.to(states.device), states[0]).unflatten(0, self.shape)

    def unpack_heads(self, states: Tensor) -> Tensor:
        """(1, G, N, d) -> (B, G, S, d), in the memory order of (B, S, G, d) as before."""
        return self.unpack(states.transpose(1, 2)).transpose(1, 2)


def real_tokens(mask: Tensor) -> RealTokens | None:
    """The real tokens of a (B, S) mask, or None where packing does not pay; waits for the device once."""
    if torch.compiler.is_compiling():
        return None
    rows = mask.bool().flatten().nonzero().squeeze(1)
    if len(rows) == 0 or len(rows) > WORTHWHILE * mask.numel():
        return None
    return RealTokens((mask.shape[0], mask.shape[1]), rows)
