"""The adapter: the encoder's last states become soft prompt tokens of the LLM."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layalign._plain import brought, require_input
from layalign.errors import MAX_SIZE, whole_number


class MLP(nn.Module):
    """linear1 (D_e -> width), relu, linear2 (width -> D_l); the width is 2 D_e as published."""

    def __init__(self, mt_dim: int, llm_dim: int, width: int | None = None) -> None:
        super().__init__()
        mt_dim = whole_number("mt_dim", mt_dim, 1, MAX_SIZE)
        llm_dim = whole_number("llm_dim", llm_dim, 1, MAX_SIZE)
        width = mt_dim * 2 if width is None else whole_number("width", width, 1, MAX_SIZE)
        self.linear1 = nn.Linear(mt_dim, width)
        self.linear2 = nn.Linear(width, llm_dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, S, D_e) -> (B, S, D_l)."""
        return self.linear2(torch.relu(self.linear1(hidden_states)))


class Adapter(nn.Module):
    """Published name ``Mapping``: an MLP over the encoder's last states, and the learned boundary token behind them.

    Args:
        mt_dim: encoder hidden size D_e.
        llm_dim: LLM hidden size D_l.
        width: of the MLP; None is 2 D_e, as published.

    Source: LayAlign, adapter; MindMerger's mapping layer.
    """

    def __init__(self, mt_dim: int, llm_dim: int, width: int | None = None) -> None:
        super().__init__()
        self.mlp = MLP(mt_dim, llm_dim, width)
        self.end_boundary = nn.Parameter(torch.zeros(1, 1, llm_dim))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, S, D_e) -> (B, S, D_l).

        Raises:
            ArgumentError: not a floating tensor of D_e, or another dtype than the weights'.
        """
        require_input("hidden_states", hidden_states, self.mlp.linear1)
        return self.mlp(hidden_states)

    def get_embed(self) -> Tensor:
        """The boundary token, (1, 1, D_l)."""
        with brought(self):
            return self.end_boundary


Mapping = Adapter
