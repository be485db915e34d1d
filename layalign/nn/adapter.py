"""The adapter: maps the encoder's hidden states, of the last or of all layers fused, to soft tokens of the LLM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layalign.nn.inspection import brought, require_input
from layalign.utils.errors import MAX_SIZE, ArgumentError, one_of, refuse, whole_number

FUSIONS = ("softmax", "token-softmax")
FEED_FORWARD = 2048  # torch's default, as published


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


class SoftmaxFusion(nn.Module):
    """One weight per layer, the same for all tokens: sum_e softmax(SCALE * logits)[e] * hidden[e].

    Args:
        layers: E.

    Source: Puranegedara et al. (2025), "Global Softmax". Their code multiplies the logits by a learned factor that
    starts at about 100. Here the factor is fixed and the logits start at zero.
    """

    SCALE = 10.0  # Adam moves a logit by about the learning rate a step: unscaled, the weights would stay nearly equal

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.empty(whole_number("layers", layers, 1, MAX_SIZE)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give every layer the same weight."""
        nn.init.zeros_(self.logits)

    def weights(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """E tensors (B, S, D_e) -> (E,), fp32 or float64; their sum is 1."""
        return _softmax(self.logits * self.SCALE)

    def forward(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """E tensors (B, S, D_e) -> (B, S, D_e)."""
        stacked = torch.stack(tuple(hidden_states))
        return torch.tensordot(self.weights(hidden_states).to(stacked.dtype), stacked, 1)


class TokenSoftmaxFusion(nn.Module):
    """Separate layer weights for each token: a small transformer layer maps the token's E hidden states to E logits.

    A learned vector ``cls`` attends, with one head, to itself and to the token's hidden states plus a learned embedding
    of each layer. A feed-forward block follows. Attention and block each add their input and apply a LayerNorm. A
    linear map of the result gives the logits of a softmax over the layers.

    Args:
        hidden_size: D_e.
        layers: E.

    Source: Puranegedara et al. (2025), "Transformer Softmax", with their initialisation. ``cls`` is the same for all
    tokens, so their query and key maps reduce to one vector (``query``), and their value and output maps to one map
    (``attend``). Only the row of ``cls`` is computed. There is no dropout.
    """

    def __init__(self, hidden_size: int, layers: int) -> None:
        super().__init__()
        hidden_size = whole_number("hidden_size", hidden_size, 1, MAX_SIZE)
        layers = whole_number("layers", layers, 1, MAX_SIZE)
        self.layer_embedding = nn.Parameter(torch.empty(layers, hidden_size))
        self.cls = nn.Parameter(torch.empty(hidden_size))
        self.query = nn.Parameter(torch.empty(hidden_size))
        self.attend = nn.Linear(hidden_size, hidden_size)
        self.norm1 = nn.LayerNorm(hidden_size)
        self.linear1 = nn.Linear(hidden_size, FEED_FORWARD)
        self.linear2 = nn.Linear(FEED_FORWARD, hidden_size)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.logits = nn.Linear(hidden_size, layers)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the vectors as published. The linear maps initialise themselves."""
        nn.init.normal_(self.layer_embedding)
        nn.init.zeros_(self.cls)
        nn.init.zeros_(self.query)

    def weights(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """E tensors (B, S, D_e) -> (B, S, E), fp32 or float64; their sum is 1 for each token."""
        return self._weights(torch.stack(tuple(hidden_states), dim=-2))

    def _weights(self, stacked: Tensor) -> Tensor:
        cls, query, embedding = (each.to(stacked.dtype) for each in (self.cls, self.query, self.layer_embedding))
        own = (cls @ query).expand(*stacked.shape[:-2], 1)
        scores = torch.cat([own, stacked @ query + embedding @ query], dim=-1)
        attention = _softmax(scores * cls.shape[0] ** -0.5).to(stacked.dtype)
        first, rest = attention[..., :1], attention[..., 1:]
        attended = first * cls + rest @ embedding + (rest[..., None, :] @ stacked).squeeze(-2)
        x = self.norm1(cls + self.attend(attended))
        x = self.norm2(x + self.linear2(torch.relu(self.linear1(x))))
        return _softmax(self.logits(x))

    def forward(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """E tensors (B, S, D_e) -> (B, S, D_e)."""
        stacked = torch.stack(tuple(hidden_states), dim=-2)
        return (self._weights(stacked).to(stacked.dtype)[..., None, :] @ stacked).squeeze(-2)


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


class Adapter(nn.Module):
    """An MLP over the encoder's hidden states, and a learned boundary token after them. Published as ``Mapping``.

    Args:
        mt_dim: encoder hidden size D_e.
        llm_dim: LLM hidden size D_l.
        width: hidden size of the MLP. None: 2 D_e, as published.
        fusion: None: the adapter reads the last hidden states, as published. "softmax" or "token-softmax": it reads
            those of several layers (:class:`SoftmaxFusion`, :class:`TokenSoftmaxFusion`).
        layers: E, the number of layers to fuse. None without fusion.

    Source: LayAlign, adapter; MindMerger's mapping layer.
    """

    def __init__(
        self, mt_dim: int, llm_dim: int, width: int | None = None, fusion: str | None = None, layers: int | None = None
    ) -> None:
        super().__init__()
        self.mlp = MLP(mt_dim, llm_dim, width)
        self.fusion: SoftmaxFusion | TokenSoftmaxFusion | None = None
        if fusion is not None:
            one_of("fusion", fusion, FUSIONS)
            count = whole_number("layers", layers, 1, MAX_SIZE)
            self.fusion = SoftmaxFusion(count) if fusion == FUSIONS[0] else TokenSoftmaxFusion(mt_dim, count)
        elif layers is not None:
            refuse("layers", "None for an adapter without fusion", layers)
        self.layers = layers
        self.end_boundary = nn.Parameter(torch.zeros(1, 1, llm_dim))

    def forward(self, hidden_states: Tensor | Sequence[Tensor]) -> Tensor:
        """(B, S, D_e), or with fusion E of these -> (B, S, D_l).

        Raises:
            ArgumentError: the input is not floating, its last dimension is not D_e, or its dtype is not that of the
                weights; with fusion also if it is not E tensors of one shape.
        """
        if self.fusion is None:
            require_input("hidden_states", hidden_states, self.mlp.linear1)
            return self.mlp(hidden_states)
        if not isinstance(hidden_states, Sequence) or len(hidden_states) != self.layers:
            refuse("hidden_states", f"{self.layers} tensors (B, S, D_e)", hidden_states)
        for index, states in enumerate(hidden_states):
            require_input(f"hidden_states[{index}]", states, self.mlp.linear1)
            if states.shape != hidden_states[0].shape:
                shape, first = tuple(states.shape), tuple(hidden_states[0].shape)
                raise ArgumentError(f"hidden_states[{index}]: expected the shape {first} of the first, got {shape}")
        return self.mlp(self.fusion(hidden_states))

    def get_embed(self) -> Tensor:
        """The boundary token, (1, 1, D_l)."""
        with brought(self):
            return self.end_boundary


Mapping = Adapter
