"""The operations over every available backend, against the float64 reference with an error budget."""

from __future__ import annotations

import logging

import pytest
import torch
from op_cases import DEVICE, DTYPES, attention_inputs, mix_inputs, serving, skip_unserved, within_budget
from torch import Tensor

from layalign import ArgumentError, BackendError, ops, reference
from layalign.ops import backends

MIX, ATTENTION = serving("layer_mix", "layer_projection"), serving("gated_cross_attention")
BOTH = serving("layer_mix", "layer_projection", "gated_cross_attention")


def naive_mix(hidden: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """The formula of the paper in loops, an independent check of the reference itself."""
    rows = []
    for slot in range(weight.shape[0]):
        total = sum(weight[slot, layer] * hidden[layer] for layer in range(len(hidden))) + bias[slot]
        rows.append(total.clamp(min=0))
    return torch.stack(rows)


def naive_attention(query, key, value, gate, base, mask=None) -> Tensor:
    out = base.clone()
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


def test_reference_equals_the_formulas_written_out() -> None:
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
def test_reference_attention_equals_the_formula_written_out(heads: int, groups: int, masked: bool) -> None:
    query, key, value, gate, base = attention_inputs(b=3, h=heads, g=groups)
    mask = torch.tensor([[1] * 7, [1, 0, 1, 1, 0, 0, 0], [0] * 7]).bool().to(DEVICE) if masked else None
    found = reference.gated_cross_attention(query, key, value, gate, base, key_mask=mask)
    torch.testing.assert_close(found, naive_attention(query, key, value, gate, base, mask))


@pytest.mark.parametrize("impl", MIX)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2, 1, 1, 1), (5, 6, 2, 7, 11), (33, 4, 1, 63, 59), (64, 6, 2, 97, 8)])
def test_layer_mix_and_projection_error_budget(impl: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    skip_unserved(impl, dtype)
    low = mix_inputs(*shape, dtype=dtype)
    rounded = [([x.double() for x in a] if isinstance(a, list) else a.double()) for a in low]
    exact = reference.layer_mix(*rounded[:3]), reference.layer_projection(*rounded)
    within_budget(ops.layer_mix(*low[:3], impl=impl), reference.layer_mix(*low[:3]), exact[0], dtype)
    within_budget(ops.layer_projection(*low, impl=impl), reference.layer_projection(*low), exact[1], dtype)


@pytest.mark.parametrize("impl", ATTENTION)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1, 16), (2, 4, 2, 5, 63, 59), (1, 6, 3, 97, 97, 64), (3, 8, 1, 2, 5, 80)]
)
def test_attention_error_budget(impl: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    skip_unserved(impl, dtype)
    low = attention_inputs(*shape, dtype=dtype)
    mask = torch.rand(shape[0], shape[4], generator=torch.Generator().manual_seed(1)) > 0.3
    mask = mask.to(DEVICE)
    exact = reference.gated_cross_attention(*(tensor.double() for tensor in low), key_mask=mask)
    plain = reference.gated_cross_attention(*low, key_mask=mask)
    within_budget(ops.gated_cross_attention(*low, key_mask=mask, impl=impl), plain, exact, dtype)


@pytest.mark.parametrize("impl", BOTH)
def test_gradients_equal_float64_finite_differences(impl: str) -> None:
    if impl != "torch":
        pytest.skip("only plain torch takes float64")
    hidden, *weights = (x if isinstance(x, list) else x.requires_grad_() for x in mix_inputs(e=3, slots=4, s=3, d=4))
    hidden = [layer.requires_grad_() for layer in hidden]
    w2 = torch.randn(5, 4, dtype=torch.float64, requires_grad=True, device=DEVICE)
    function = lambda *a: ops.layer_projection(list(a[:3]), *a[3:], impl=impl)  # noqa: E731
    assert torch.autograd.gradcheck(function, (*hidden, weights[0], weights[1], w2))
    inputs = [tensor.requires_grad_() for tensor in attention_inputs(b=2, t=2, s=3, d=4)]
    mask = torch.tensor([[True, False, True], [False, False, False]], device=DEVICE)
    function = lambda *a: ops.gated_cross_attention(*a, key_mask=mask, impl=impl)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("impl", BOTH)
def test_views_and_poisoned_padding(impl: str) -> None:
    hidden, weight, bias, *_ = mix_inputs(dtype=torch.float32)
    wide = [torch.full((2, 14, 22), torch.nan, device=DEVICE) for _ in hidden]
    for place, layer in zip(wide, hidden, strict=True):
        place[:, ::2, :11] = layer
    views = [place[:, ::2, :11] for place in wide]
    assert not views[0].is_contiguous()
    torch.testing.assert_close(ops.layer_mix(views, weight, bias, impl=impl), ops.layer_mix(hidden, weight, bias))

    query, key, value, gate, base = attention_inputs(dtype=torch.float32)
    mask = torch.tensor([[True] * 7, [True] * 3 + [False] * 4], device=DEVICE)
    expected = ops.gated_cross_attention(query, key, value, gate, base, key_mask=mask)
    strided = query.transpose(1, 2).contiguous().transpose(1, 2)  # as transformers hands it over
    key, value = key.clone(), value.clone()
    key[1, :, 3:], value[1, :, 3:] = torch.nan, torch.nan
    found = ops.gated_cross_attention(strided, key, value, gate, base, key_mask=mask, impl=impl)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("impl", ATTENTION)
def test_a_fully_masked_source_gives_base_and_finite_gradients(impl: str) -> None:
    inputs = [tensor.float().requires_grad_() for tensor in attention_inputs(b=1)]
    out = ops.gated_cross_attention(*inputs, key_mask=torch.zeros(1, 7, dtype=torch.bool, device=DEVICE), impl=impl)
    assert torch.equal(out, inputs[4])
    out.sum().backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in inputs)
    assert inputs[0].grad.abs().sum() == 0


def test_scale_is_used() -> None:
    query, key, value, gate, base = attention_inputs()
    doubled = ops.gated_cross_attention(2 * query, key, value, gate, base)
    torch.testing.assert_close(ops.gated_cross_attention(query, key, value, gate, base, scale=2 * 6**-0.5), doubled)


def test_every_bad_argument_is_named() -> None:
    hidden, weight, bias, w2, b2 = mix_inputs()
    query, key, value, gate, base = attention_inputs()
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
        (attend, (query, key, value, gate, base.transpose(1, 2)), r"base: expected shape \(B, T, H, d\)"),
    ]
    for function, arguments, message in bad:
        with pytest.raises(ArgumentError, match=message):
            function(*arguments)
    for wrong, message in ((mask.long(), "key_mask: expected a bool tensor"), (mask[:1], "key_mask: expected shape")):
        with pytest.raises(ArgumentError, match=message):
            attend(query, key, value, gate, base, key_mask=wrong)


def test_backends_answer_for_themselves(caplog: pytest.LogCaptureFixture) -> None:
    report = {status.name: status for status in backends.report(DEVICE)}
    assert list(report) == list(backends.names())
    assert report["torch"].available
    assert all(status.reason for status in report.values())
    hidden, weight, bias, *_ = mix_inputs()
    with pytest.raises(ArgumentError, match="impl: expected 'auto' or one of triton, cuda, cpp, torch, got 'fast'"):
        ops.layer_mix(hidden, weight, bias, impl="fast")
    for name, status in report.items():
        if not status.available and name != "torch":
            with pytest.raises(BackendError, match=f"layer_mix: impl='{name}' cannot serve this call: "):
                ops.layer_mix(hidden, weight, bias, impl=name)
    backends._LOGGED.clear()
    with caplog.at_level(logging.INFO, logger="layalign"):
        ops.layer_mix(hidden, weight, bias)
        ops.layer_mix(hidden, weight, bias)
    assert len([record for record in caplog.records if f"layer_mix on {DEVICE}: backend" in record.message]) == 1


@pytest.mark.parametrize("impl", BOTH)
def test_compiles_into_one_graph_with_dynamic_source_length(impl: str) -> None:
    pytest.importorskip("torch._dynamo")

    def both(hidden, weight, bias, w2, b2, query, key, value, gate, base):
        y = ops.layer_projection(hidden, weight, bias, w2, b2, impl=impl)
        return y, ops.gated_cross_attention(query, key, value, gate, base, impl=impl)

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9, 12):
        inputs = (*mix_inputs(s=length, dtype=torch.float32), *attention_inputs(s=length, dtype=torch.float32))
        for found, expected in zip(compiled(*inputs), both(*inputs), strict=True):
            torch.testing.assert_close(found, expected)
