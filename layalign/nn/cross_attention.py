"""Gated cross-attention with its learned gate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layalign import ops
from layalign.errors import finite_number


class GatedCrossAttention(nn.Module):
    """base + gate * attention(query, key, value), the gate starting at zero so that the LLM starts unchanged.

    Args:
        impl: backend of the operation, "auto" by default.
        gate: None, it is learned; a number fixes it there.

    Source: LayAlign, adaptive fusion-enhanced attention; the zero-initialised gate is LLaMA-Adapter's.
    """

    def __init__(self, impl: str = "auto", gate: float | None = None) -> None:
        super().__init__()
        self.impl = impl
        self.start = 0.0 if gate is None else finite_number("gate", gate)
        self.adaption_gate = nn.Parameter(torch.full((1,), self.start), requires_grad=gate is None)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        base: Tensor | None = None,
        key_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """See :func:`layalign.ops.gated_cross_attention`: (B, H, T, d), twice (B, G, S, d) -> (B, T, H, d)."""
        return ops.gated_cross_attention(
            query, key, value, self.adaption_gate, base, key_mask=key_mask, scale=scale, impl=self.impl
        )
