"""Cross-attention to the source, scaled by a learned gate and added to the self-attention's output."""

from __future__ import annotations

import torch
from torch import Tensor

from layalign import reference
from layalign.errors import ArgumentError
from layalign.ops import _checks, backends

backends.register("gated_cross_attention", "torch", reference.gated_cross_attention)


def gated_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    base: Tensor | None = None,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """base + gate * softmax(query @ key.T * scale + mask) @ value.

    Args:
        query: (B, H, T, d), floating.
        key, value: (B, G, S, d), floating, H a multiple of G.
        gate: a tensor with one number, on the device.
        base: (B, T, H, d) or None.
        key_mask: (B, S) bool, true where attended, or None. A row that is all false contributes zero.
        scale: factor on the scores, 1 / sqrt(d) by default.
        impl: "auto" or a backend's name.

    Returns:
        (B, T, H, d) in the dtype of ``query``, as transformers' attention functions return it.

    Raises:
        ArgumentError: a shape, dtype or device does not fit.
        BackendError: the named backend cannot serve the call.

    Source: LayAlign, adaptive fusion-enhanced attention.
    """
    _check(query, key, value, gate, base, key_mask)
    return backends.dispatch(
        "gated_cross_attention",
        impl,
        query.device,
        query,
        key,
        value,
        gate,
        base,
        key_mask=key_mask,
        scale=scale,
    )


def _check(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor, base: Tensor | None, key_mask: Tensor | None
) -> None:
    _checks.require_tensor("query", query, 4, "(B, H, T, d)")
    _checks.require_tensor("key", key, 4, "(B, G, S, d)")
    _checks.require_tensor("value", value, 4, "(B, G, S, d)")
    batch, heads, length, size = query.shape
    groups, source = key.shape[1], key.shape[2]
    if groups == 0 or heads % groups:
        raise ArgumentError(f"key: expected a number of heads G that divides H = {heads}, got G = {groups}")
    _checks.require_shape("key", key, (batch, groups, source, size), "(B, G, S, d)")
    _checks.require_shape("value", value, (batch, groups, source, size), "(B, G, S, d)")
    _checks.require_same_device("key", key, "query", query)
    _checks.require_same_device("value", value, "query", query)
    if not isinstance(gate, Tensor) or gate.numel() != 1 or not gate.is_floating_point():
        raise ArgumentError(f"gate: expected a floating tensor with one number, got {_checks.describe(gate)}")
    _checks.require_same_device("gate", gate, "query", query)
    if base is not None:
        _checks.require_tensor("base", base, 4, "(B, T, H, d)")
        _checks.require_shape("base", base, (batch, length, heads, size), "(B, T, H, d)")
        _checks.require_same_device("base", base, "query", query)
    if key_mask is not None:
        if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
            raise ArgumentError(f"key_mask: expected a bool tensor (B, S), got {_checks.describe(key_mask)}")
        _checks.require_shape("key_mask", key_mask, (batch, source), "(B, S)")
        _checks.require_same_device("key_mask", key_mask, "query", query)
