"""Gated cross-attention with its learned gate."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from layalign import ops, reference
from layalign.nn.inspection import computes, readable
from layalign.utils.errors import finite_number


@readable
class GatedCrossAttention(nn.Module):
    """residual + gate * attention(query, key, value). The gate starts at zero, so the LLM starts unchanged.

    To try another formula for the gate, change :meth:`effective_gate`; to try another term, change ``forward``.

    Args:
        impl: backend of the operation, "auto" by default.
        gate: None: it is learned and starts at zero. A number: it is fixed at that value.

    Source: LayAlign, adaptive fusion-enhanced attention; the zero-initialised gate is LLaMA-Adapter's.
    """

    def __init__(self, impl: str = "auto", gate: float | None = None) -> None:
        super().__init__()
        self.impl = impl
        self.start = 0.0 if gate is None else finite_number("gate", gate)
        self.adaption_gate = nn.Parameter(torch.full((1,), self.start), requires_grad=gate is None)

    def effective_gate(self) -> Tensor:
        """The factor on the attention, (1,): the parameter itself. Every path reads the gate here."""
        return self.adaption_gate

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        residual: Tensor | None = None,
        key_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """See :func:`layalign.ops.gated_cross_attention`: (B, H, T, d), twice (B, G, S, d) -> (B, T, H, d)."""
        gate = self.effective_gate()
        # The operation refuses what is no tensor. A copy is never kept: a gate may be written to at any time.
        if isinstance(query, Tensor) and gate.device != query.device:
            gate = gate.to(query.device)
        return ops.gated_cross_attention(
            query, key, value, gate, residual, key_mask=key_mask, scale=scale, impl=self.impl
        )


@functools.cache
def computes_the_reference() -> bool:
    """Whether ``forward`` above computes the documented formula, tried once on small numbers.

    The fast paths compute that formula. If ``forward`` has been edited, the modules are called instead.
    """

    def inputs() -> tuple[GatedCrossAttention, Tensor, Tensor, Tensor, Tensor]:
        query, key, value, residual = torch.arange(96.0, dtype=torch.float64).sin().view(4, 2, 2, 3, 2)
        return GatedCrossAttention(impl="torch", gate=0.7).double(), query, key, value, residual.transpose(1, 2)

    def expected() -> list[Tensor]:
        module, query, key, value, residual = inputs()
        return [reference.gated_cross_attention(query, key, value, module.effective_gate(), residual, scale=0.5)]

    def found() -> list[Tensor]:
        module, query, key, value, residual = inputs()
        return [module(query, key, value, residual=residual, scale=0.5)]

    return computes(expected, found)
