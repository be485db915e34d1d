"""The reference equals the formulas of the paper, written out in loops."""

from __future__ import annotations

import pytest
import torch
from op_cases import DEVICE, attention_inputs, mix_inputs
from torch import Tensor

from layalign import reference


def naive_mix(hidden: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    rows = []
    for slot in range(weight.shape[0]):
        total = sum(weight[slot, layer] * hidden[layer] for layer in range(len(hidden))) + bias[slot]
        rows.append(total.clamp(min=0))
    return torch.stack(rows)


def naive_attention(query, key, value, gate, residual, mask=None) -> Tensor:
    out = residual.clone()
    batch, heads, length, size = query.shape
    for b in range(batch):
        keep = torch.arange(key.shape[2], device=DEVICE) if mask is None else mask[b].nonzero().flatten()
        for h in range(heads):
            group = h * key.shape[1] // heads
            for t in range(length):
                if len(keep) == 0:
                    continue
                scores = (key[b, group, keep] @ query[b, h, t]) / size**0.5
                out[b, t, h] += gate * (scores.softmax(0) @ value[b, group, keep])
    return out


def test_layer_mix_and_its_projections() -> None:
    hidden, weight, bias, w2, b2 = mix_inputs()
    x = naive_mix(hidden, weight, bias)
    torch.testing.assert_close(reference.layer_mix(hidden, weight, bias), x)
    torch.testing.assert_close(reference.layer_projection(hidden, weight, bias, w2, b2), x @ w2.T + b2)
    w3 = torch.randn(4, 13, dtype=torch.float64, device=DEVICE)
    expected = torch.relu(x @ w2.T + b2) @ w3.T
    torch.testing.assert_close(reference.mlp_projection(hidden, weight, bias, w2, b2, w3), expected)
    per_slot, per_bias = (
        torch.randn(6, 3, 11, dtype=torch.float64, device=DEVICE),
        torch.randn(6, 3, dtype=torch.float64, device=DEVICE),
    )
    expected = torch.stack([x[j] @ per_slot[j].T + per_bias[j] for j in range(6)])
    torch.testing.assert_close(reference.layer_projection(hidden, weight, bias, per_slot, per_bias), expected)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1), (6, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_gated_cross_attention(heads: int, groups: int, masked: bool) -> None:
    query, key, value, gate, residual = attention_inputs(b=3, h=heads, g=groups)
    mask = torch.tensor([[1] * 7, [1, 0, 1, 1, 0, 0, 0], [0] * 7]).bool().to(DEVICE) if masked else None
    found = reference.gated_cross_attention(query, key, value, gate, residual, key_mask=mask)
    torch.testing.assert_close(found, naive_attention(query, key, value, gate, residual, mask))
