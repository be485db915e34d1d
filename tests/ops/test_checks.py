"""Every bad argument of an operation is named, with what was expected and what came."""

from __future__ import annotations

import pytest
import torch
from op_cases import DEVICE, attention_inputs, mix_inputs

from layalign import ArgumentError, ops


def test_every_bad_argument_is_named() -> None:
    hidden, weight, bias, w2, b2 = mix_inputs()
    query, key, value, gate, residual = attention_inputs()
    mask = torch.ones(2, 7, dtype=torch.bool, device=DEVICE)
    mix, project, attend = ops.layer_mix, ops.layer_projection, ops.gated_cross_attention
    bad = [
        (mix, ([], weight), r"hidden: expected a non-empty list"),
        (mix, (hidden[0], weight), r"hidden: expected a non-empty list"),
        (mix, ([hidden[0][0]] * 5, weight), r"hidden\[0\]: expected a floating tensor \(B, S, D_e\)"),
        (mix, ([*hidden[:4], hidden[4][:, 1:]], weight), r"hidden\[4\]: expected float64 \(2, 7, 11\) on"),
        (mix, ([*hidden[:4], hidden[4].float()], weight), r"hidden\[4\]: expected float64"),
        (mix, (hidden, weight[:, 1:]), r"weight: expected shape \(2L, E\) = \(6, 5\), got \(6, 4\)"),
        (mix, (hidden, weight.long()), "weight: expected a floating tensor"),
        (mix, (hidden, weight, bias[1:]), r"bias: expected shape \(2L,\) = \(6,\), got \(5,\)"),
        (mix, (hidden, weight.to("meta"), bias), r"weight: expected the device of hidden\[0\] \(.*\), got meta"),
        (project, (hidden, weight[:, 1:], bias, w2), "mix_weight: expected shape"),
        (project, (hidden, weight, bias, w2[:, 1:]), r"weight: expected shape .* = \(13, 11\), got \(13, 10\)"),
        (project, (hidden, weight, bias, w2[None]), r"weight: expected shape .* = \(6, 13, 11\)"),
        (project, (hidden, weight, bias, w2, b2[1:]), r"bias: expected shape .* = \(13,\), got \(12,\)"),
        (project, (hidden, weight, bias, w2[0]), r"weight: expected a floating tensor \(D_out, D_e\)"),
        (attend, (query[0], key, value, gate), r"query: expected a floating tensor \(B, H, T, d\)"),
        (attend, (query, key[:, :, :, 1:], value, gate), r"key: expected shape \(B, G, S, d\)"),
        (attend, (query, key, value[:, :, 1:], gate), r"value: expected shape"),
        (attend, (query[:, :3], key, value, gate), r"key: expected a number of heads G that divides H = 3, got G = 2"),
        (attend, (query, key, value, torch.zeros(2)), "gate: expected a floating tensor with one number"),
        (attend, (query, key, value, 0.5), "gate: expected a floating tensor with one number, got float"),
        (attend, (query, key, value, gate, residual.transpose(1, 2)), r"residual: expected shape \(B, T, H, d\)"),
    ]
    for function, arguments, message in bad:
        with pytest.raises(ArgumentError, match=message):
            function(*arguments)
    for wrong, message in ((mask.long(), "key_mask: expected a bool tensor"), (mask[:1], "key_mask: expected shape")):
        with pytest.raises(ArgumentError, match=message):
            attend(query, key, value, gate, residual, key_mask=wrong)
