"""LayAlign in plain PyTorch: the mathematics as written, for any float dtype (float64 included).

This file is the oracle of the tests and the baseline of the benchmarks. It favours reading over speed and imports
nothing else of the library. Source: Ruan et al., "LayAlign", Findings of NAACL 2025.

Shapes: B batch, S source tokens, T language-model tokens, E encoder layers, L language layers (2L mixes: one for the
keys and one for the values of each layer), D_e and D_l the hidden sizes of encoder and language model, H query heads,
G key/value heads, d the head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def layer_mix(hidden: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x[j] = relu(sum_e weight[j, e] * hidden[e] + bias[j]).

    Args:
        hidden: E tensors (B, S, D_e).
        weight: (2L, E).
        bias: (2L,) or None.

    Returns:
        (2L, B, S, D_e).
    """
    mixed = torch.einsum("je,ebsd->jbsd", weight, torch.stack(list(hidden)))
    if bias is not None:
        mixed = mixed + bias[:, None, None, None]
    return torch.relu(mixed)


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[j] = x[j] @ weight.T + bias, with one weight for all mixes or one per mix.

    Args:
        x: (2L, B, S, D_e).
        weight: (D_out, D_e), or (2L, D_out, D_e).
        bias: (D_out,), or (2L, D_out), or None.

    Returns:
        (2L, B, S, D_out).
    """
    if weight.dim() == 2:
        y = torch.einsum("jbsd,od->jbso", x, weight)
    else:
        y = torch.einsum("jbsd,jod->jbso", x, weight)
    if bias is None:
        return y
    return y + (bias if bias.dim() == 1 else bias[:, None, None, :])


def layer_projection(
    hidden: Sequence[Tensor],
    mix_weight: Tensor,
    mix_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """The layer mix followed by the projection ("Linear"): (2L, B, S, D_out)."""
    return project(layer_mix(hidden, mix_weight, mix_bias), weight, bias)


def mlp_projection(
    hidden: Sequence[Tensor],
    mix_weight: Tensor,
    mix_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None = None,
) -> Tensor:
    """The projection with structure "MLP": relu after the first linear map, then a second one."""
    return project(torch.relu(layer_projection(hidden, mix_weight, mix_bias, weight, bias)), out_weight, out_bias)


def softmax_fusion(hidden: Sequence[Tensor], logits: Tensor) -> Tensor:
    """y = sum_e softmax(logits)[e] * hidden[e].

    Args:
        hidden: E tensors (B, S, D_e).
        logits: (E,), for all tokens; or (B, S, E).

    Returns:
        (B, S, D_e).
    """
    weights = logits.softmax(dim=-1).expand(*hidden[0].shape[:2], len(hidden))
    return torch.einsum("bse,ebsd->bsd", weights, torch.stack(list(hidden)))


def token_logits(
    hidden: Sequence[Tensor],
    layer_embedding: Tensor,
    cls: Tensor,
    query: Tensor,
    attend: tuple[Tensor, Tensor],
    norm1: tuple[Tensor, Tensor],
    linear1: tuple[Tensor, Tensor],
    linear2: tuple[Tensor, Tensor],
    norm2: tuple[Tensor, Tensor],
    out: tuple[Tensor, Tensor],
) -> Tensor:
    """Logits over the encoder's layers for each token.

    A transformer layer (residual, then norm) reads the sequence [cls, hidden[0] + layer_embedding[0], ...] of a token.
    A linear map of its output at cls gives the logits. The maps and norms are pairs of weight and bias.

    Source: Puranegedara et al. (2025), "Transformer Softmax".

    Args:
        hidden: E tensors (B, S, D_e).
        layer_embedding: (E, D_e).
        cls, query: (D_e,).
        attend: (D_e, D_e) and (D_e,).
        norm1, norm2: (D_e,) and (D_e,).
        linear1, linear2: (F, D_e) and (F,); (D_e, F) and (D_e,).
        out: (E, D_e) and (E,).

    Returns:
        (B, S, E).
    """
    size = (len(cls),)
    layers = torch.stack(list(hidden), dim=2) + layer_embedding
    sequence = torch.cat([cls.expand(*layers.shape[:2], 1, -1), layers], dim=2)
    attention = (torch.einsum("bsnd,d->bsn", sequence, query) * len(cls) ** -0.5).softmax(dim=-1)
    attended = torch.einsum("bsn,bsnd->bsd", attention, sequence)
    x = functional.layer_norm(cls + functional.linear(attended, *attend), size, *norm1)
    x = x + functional.linear(torch.relu(functional.linear(x, *linear1)), *linear2)
    return functional.linear(functional.layer_norm(x, size, *norm2), *out)


def gated_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    residual: Tensor | None = None,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """residual + gate * softmax(query @ key.T * scale + mask) @ value.

    Each key/value head serves H / G neighbouring query heads. A row whose source is fully masked contributes zero.

    Args:
        query: (B, H, T, d), as self-attention uses it (after RoPE and any q-norm).
        key, value: (B, G, S, d), no RoPE.
        gate: one number.
        residual: (B, T, H, d), the self-attention's output before its output projection, or None for zero.
        key_mask: (B, S) bool, true where a source token may be attended; None attends to all.
        scale: factor on the scores, 1 / sqrt(d) by default.

    Returns:
        (B, T, H, d) in the dtype of ``query``.
    """
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    scale = size**-0.5 if scale is None else scale
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32  # softmax in fp32 at least

    q = query.reshape(batch, groups, heads // groups, length, size)
    scores = torch.einsum("bgrtd,bgsd->bgrts", q, key.to(query.dtype)).to(accumulate) * scale
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, None, :], -torch.inf)
        # A fully masked row would be 0/0. Any finite score will do: its probabilities are zeroed below.
        empty = ~key_mask.any(dim=-1)[:, None, None, None, None]
        scores = scores.masked_fill(empty, 0.0)
    probabilities = scores.softmax(dim=-1)
    if key_mask is not None:
        probabilities = probabilities.masked_fill(empty, 0.0)
        # 0 * NaN is NaN: values in the padding must not matter.
        value = value.masked_fill(~key_mask[:, None, :, None], 0.0)
    attended = torch.einsum("bgrts,bgsd->btgrd", probabilities.to(query.dtype), value.to(query.dtype))
    # The gate is one number, whatever its shape. A wider residual does not widen the result.
    out = gate.to(query.dtype).reshape(()) * attended.reshape(batch, length, heads, size)
    return out if residual is None else (residual + out).to(query.dtype)
