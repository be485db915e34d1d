"""LayAlign in plain PyTorch: the mathematics as written, for any float dtype (float64 included).

This file is the oracle of the tests and the baseline of the benchmarks. It favours reading over speed and imports
nothing else of the library. Source: Ruan et al., "LayAlign", Findings of NAACL 2025.

Shapes: B batch, S source tokens, T language-model tokens, E encoder layers, L language layers (2L slots: a key slot and
a value slot each), D_e and D_l the hidden sizes of encoder and language model, H query heads, G key/value heads,
d the head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
    """y[j] = x[j] @ weight.T + bias, with one weight for all slots or one per slot.

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


def gated_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    base: Tensor | None = None,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """base + gate * softmax(query @ key.T * scale + mask) @ value.

    Each key/value head serves H / G neighbouring query heads. A row whose source is all masked contributes zero.

    Args:
        query: (B, H, T, d), as self-attention uses it (after RoPE and any q-norm).
        key, value: (B, G, S, d), no RoPE.
        gate: one number.
        base: (B, T, H, d), the self-attention's output before its output projection, or None for zero.
        key_mask: (B, S) bool, true where a source token may be attended; None attends to all.
        scale: factor on the scores, 1 / sqrt(d) by default.

    Returns:
        (B, T, H, d) in the dtype of ``query``.
    """
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    scale = size**-0.5 if scale is None else scale
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32  # softmax in fp32, whatever comes in

    q = query.reshape(batch, groups, heads // groups, length, size)
    scores = torch.einsum("bgrtd,bgsd->bgrts", q, key.to(query.dtype)).to(accumulate) * scale
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, None, :], -torch.inf)
        # A fully masked row would be 0/0; any finite score will do, its probabilities are zeroed below.
        empty = ~key_mask.any(dim=-1)[:, None, None, None, None]
        scores = scores.masked_fill(empty, 0.0)
    probabilities = scores.softmax(dim=-1)
    if key_mask is not None:
        probabilities = probabilities.masked_fill(empty, 0.0)
        # 0 * NaN is NaN: what lies in the padding must not matter.
        value = value.masked_fill(~key_mask[:, None, :, None], 0.0)
    attended = torch.einsum("bgrts,bgsd->btgrd", probabilities.to(query.dtype), value.to(query.dtype))
    # A gate of any shape is one number; a base of a wider type does not widen the result.
    out = gate.to(query.dtype).reshape(()) * attended.reshape(batch, length, heads, size)
    return out if base is None else (base + out).to(query.dtype)
