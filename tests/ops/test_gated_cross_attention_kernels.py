"""The kernels of gated cross-attention against the float64 reference, over every backend that has some here.

Without a GPU that is Triton's interpreter, the C++ kernels where the extension is built, and the CUDA kernels'
emulation where LAYALIGN_EMULATE_CUDA names it.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import BACKENDS, DEVICE, DTYPES, inputs, make_mask, poison, skip_unserved, within_budget
from torch import Tensor

from layalign import BackendError, ops, reference
from layalign.ops import backends

every_backend = pytest.mark.parametrize("impl", BACKENDS)
NAMES = ("query", "key", "value", "gate", "residual")
real_empty = torch.empty


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher allocates is NaN until a kernel writes it."""

    def poisoned(*args, **kwargs) -> Tensor:
        tensor = real_empty(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def exact_and_plain(low: list[Tensor], mask: Tensor | None, grad: Tensor, scale=None):
    """[out, dq, dk, dv, dgate, dbase] in float64 and by plain torch in the inputs' type."""
    results = []
    for dtype in (torch.float64, low[0].dtype):
        leaves = [x.to(dtype).detach().requires_grad_() for x in low]
        out = reference.gated_cross_attention(*leaves, key_mask=mask, scale=scale)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))])
    return results


def terms_of_one_score(name: str, low: list[Tensor], grad: Tensor) -> float:
    """The largest gradient of query or key (S = 1), were g . v and delta, its equal, of one sign in every term."""
    query, key, value, gate = (x.double().abs() for x in low[:4])
    shared = query.shape[1] // key.shape[1]
    both = (
        2 * grad.double().abs().transpose(1, 2) @ value.repeat_interleave(shared, 1).mT * gate * query.shape[-1] ** -0.5
    )
    if name == "query":
        return float((both @ key.repeat_interleave(shared, 1)).max())
    return float((both.mT @ query).unflatten(1, (-1, shared)).sum(2).max())


def check_gradients(found, plain, exact, low: list[Tensor], grad: Tensor, mask: Tensor | None) -> None:
    for name, a, b, c in zip(NAMES, found, plain, exact, strict=True):
        if name == "gate":  # a sum over everything: its condition is that of the terms, not of the result
            one = torch.ones(1, dtype=torch.float64, device=DEVICE)
            attended = reference.gated_cross_attention(*(x.double() for x in low[:3]), one, key_mask=mask)
            terms = (attended * grad.double()).abs().sum()
            assert (a.double() - c).abs().item() <= 2 * torch.finfo(a.dtype).eps * terms + 2 * (b - c).abs().item()
        elif name in ("query", "key") and low[1].shape[2] == 1:  # of a single score nothing is left, in exact numbers
            assert not c.any() and not b.any()
            assert a.abs().max() <= 2 * torch.finfo(torch.float32).eps * terms_of_one_score(name, low, grad)
        else:
            within_budget(a, b, c, low[0].dtype)


def run(impl: str, low: list[Tensor], mask: Tensor | None, grad: Tensor, scale=None) -> list[Tensor]:
    """[out, dq, dk, dv, dgate, dbase] by the kernels, with NaN in what is masked."""
    leaves = [low[0], poison(low[1], mask), poison(low[2], mask), low[3], low[4]]
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = ops.gated_cross_attention(*leaves, key_mask=mask, scale=scale, impl=impl)
    assert out.is_contiguous()
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.slow
@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((2, 4, 2, 5, 7, 16), "random"),
        ((2, 2, 1, 17, 63, 59), "left"),
        ((1, 3, 3, 1, 97, 64), "none"),
        ((2, 4, 1, 5, 97, 80), "right"),
        ((2, 2, 2, 17, 1, 128), "none"),
        ((2, 2, 1, 70, 33, 32), "row"),
        ((1, 1, 1, 3, 5, 256), "random"),
    ],
)
def test_results_and_gradients_within_the_error_budget(
    impl: str, shape: tuple[int, ...], kind: str, dtype: torch.dtype
) -> None:
    skip_unserved(impl, dtype)
    low, mask = inputs(*shape, dtype=dtype), make_mask(kind, shape[0], shape[4])
    grad = torch.randn(low[4].shape, generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype)
    exact, plain = exact_and_plain(low, mask, grad)
    found = run(impl, low, mask, grad)
    within_budget(found[0], plain[0], exact[0], dtype)
    check_gradients(found[1:], plain[1:], exact[1:], low, grad, mask)
    # The projections get their gradients in the memory order in which they wrote.
    assert all(found[i].transpose(1, 2).is_contiguous() for i in (1, 2, 3))
    assert torch.equal(found[5], grad)
    if kind == "row":
        assert torch.equal(found[0][0], low[4][0])
        assert all(found[i][0].abs().sum() == 0 for i in (1, 2, 3))


@every_backend
@pytest.mark.parametrize("kind", ["random", "left", "right", "row"])
def test_masked_tokens_have_no_influence_and_no_gradient(impl: str, kind: str) -> None:
    low, mask = inputs(3, 2, 1, 3, 40, 16), make_mask(kind, 3, 40)
    grad = torch.randn(low[4].shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    exact, plain = exact_and_plain(low, mask, grad, scale=-0.6)
    found = run(impl, low, mask, grad, scale=-0.6)
    within_budget(found[0], plain[0], exact[0], torch.float32)
    check_gradients(found[1:], plain[1:], exact[1:], low, grad, mask)
    assert mask is not None
    masked = ~mask[:, None].expand(3, 1, 40)
    assert found[2][masked].abs().sum() == 0 and found[3][masked].abs().sum() == 0


@every_backend
def test_a_scale_of_zero_averages_what_is_attended(impl: str) -> None:
    low, mask = inputs(3, 2, 1, 3, 40, 16), make_mask("random", 3, 40)
    grad = torch.ones_like(low[4])
    exact, plain = exact_and_plain(low, mask, grad, scale=0.0)
    found = run(impl, low, mask, grad, scale=0.0)
    within_budget(found[0], plain[0], exact[0], torch.float32)
    within_budget(found[3], plain[3], exact[3], torch.float32)
    assert not found[1].any() and not found[2].any()


@every_backend
def test_a_zero_gate_still_has_a_gradient(impl: str) -> None:
    low = inputs(2, 2, 1, 17, 37, 16, gate=0.0)
    grad = torch.randn(low[4].shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    exact, plain = exact_and_plain(low, None, grad)
    found = run(impl, low, None, grad)
    assert torch.equal(found[0], low[4])
    assert exact[4].abs() > 0.1
    check_gradients(found[1:], plain[1:], exact[1:], low, grad, None)
    assert all(found[i].abs().sum() == 0 for i in (1, 2, 3))


@every_backend
def test_without_base_and_with_a_gate_and_base_of_other_types(impl: str) -> None:
    query, key, value, gate, residual = inputs(1, 4, 2, 17, 9, 32, dtype=torch.float16)
    exact = reference.gated_cross_attention(*(x.double() for x in (query, key, value, gate)))
    plain = reference.gated_cross_attention(query, key, value, gate)
    with torch.enable_grad():
        leaf = residual.float().requires_grad_()
        out = ops.gated_cross_attention(query, key, value, gate.float(), leaf, impl=impl)
        out.sum().backward()
    assert out.dtype == torch.float16 and leaf.grad.dtype == torch.float32 and leaf.grad.eq(1).all()
    within_budget(out.detach(), plain + residual, exact + residual.double(), torch.float16)
    for found in (
        backends.launcher(impl, "gated_cross_attention_forward")(query, key, value, gate, None, None, None)[0],
        ops.gated_cross_attention(query[:, :, :5], key, value, gate, impl=impl),
    ):
        within_budget(found, plain[:, : found.shape[1]], exact[:, : found.shape[1]], torch.float16)


@every_backend
def test_log_sum_exp_is_base_2_and_says_when_nothing_is_attended(impl: str) -> None:
    query, key, value, gate, _ = inputs(2, 2, 1, 3, 20, 16)
    mask = make_mask("row", 2, 20)
    _, lse = backends.launcher(impl, "gated_cross_attention_forward")(query, key, value, gate, None, mask, 0.3)
    scores = torch.einsum("bhtd,bsd->bhts", query.double(), key[:, 0].double()) * 0.3
    expected = scores.masked_fill(~mask[:, None, None], -torch.inf).logsumexp(-1) / torch.tensor(2.0).log().double()
    torch.testing.assert_close(lse.double(), expected, atol=1e-5, rtol=1e-5)
    assert lse[0].eq(-torch.inf).all()


@every_backend
@pytest.mark.parametrize("b, t, s", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (1, 17, 0)])
def test_nothing_to_attend_gives_base_and_zero_gradients(impl: str, b: int, t: int, s: int) -> None:
    low = [x.requires_grad_() for x in inputs(b, 4, 2, t, s, 16)]
    with torch.no_grad():
        out = ops.gated_cross_attention(*low, impl=impl)
    assert torch.equal(out, low[4])
    out = ops.gated_cross_attention(*low, impl=impl)
    assert torch.equal(out, low[4])
    out.sum().backward()
    assert all(x.grad.shape == x.shape and x.grad.abs().sum() == 0 for x in low[:4])


@pytest.mark.slow
@every_backend
def test_any_strides_stay_within_the_error_budget(impl: str) -> None:
    b, h, g, t, s, d = 2, 4, 2, 18, 11, 16
    fused = torch.randn(b, t, (h + 2 * g) * d, device=DEVICE)
    query = fused[..., : h * d].view(b, t, h, d).transpose(1, 2)
    wide = torch.randn(g, 2 * s, b, 2 * d, device=DEVICE)
    key, value = wide[:, ::2, :, :d].permute(2, 0, 1, 3), wide[:, 1::2, :, d:].permute(2, 0, 1, 3)
    residual = torch.randn(h, b, t, d + 3, device=DEVICE)[..., :d].permute(1, 2, 0, 3)
    mask = (torch.rand(s, b, device=DEVICE) > 0.3).T
    gate = torch.tensor(0.7, device=DEVICE)
    grad = torch.randn(b, h, t, d, device=DEVICE).transpose(1, 2)
    tensors = [query, key, value, gate, residual]
    exact, plain = exact_and_plain(tensors, mask, grad)
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = ops.gated_cross_attention(*leaves, key_mask=mask, impl=impl)
    within_budget(out.detach(), plain[0], exact[0], torch.float32)
    check_gradients(torch.autograd.grad(out, leaves, grad), plain[1:], exact[1:], tensors, grad, mask)
    # A gradient that is one number expanded, and a query whose last stride is not one.
    out = ops.gated_cross_attention(*leaves, key_mask=mask, impl=impl)
    summed = torch.autograd.grad(out.sum(), leaves)
    check_gradients(summed, *[r[1:] for r in reversed(exact_and_plain(tensors, mask, torch.ones_like(grad)))],
                    tensors, torch.ones_like(grad), mask)  # fmt: skip
    transposed = query.transpose(2, 3).contiguous().transpose(2, 3)
    found = backends.launcher(impl, "gated_cross_attention_decode")(transposed, key, value, gate, residual, mask, None)
    within_budget(found, plain[0], exact[0], torch.float32)


@pytest.mark.slow
@every_backend
def test_backward_is_deterministic(impl: str) -> None:
    query, key, value, gate, residual = inputs(2, 4, 2, 75, 21, 16)
    mask = make_mask("random", 2, 21)
    grad = torch.randn(2, 75, 4, 16, device=DEVICE)
    first, second = (run(impl, [query, key, value, gate, residual], mask, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_backend
@pytest.mark.parametrize(
    "needed, source, size",
    [
        *(((i,), 5, 16) for i in range(5)),
        ((0, 2), 5, 16),
        ((0,), 157, 64),  # in fp32 five tiles of the CUDA kernels' source, whose flags are kept for four
    ],
)
def test_only_needed_gradients_are_computed(impl: str, needed: tuple[int, ...], source: int, size: int) -> None:
    low = inputs(1, 2, 2, 17, source, size)
    grad = torch.randn(1, 17, 2, size, device=DEVICE)
    full = run(impl, low, None, grad)
    leaves = [x.detach().requires_grad_(i in needed) for i, x in enumerate(low)]
    out = ops.gated_cross_attention(*leaves, impl=impl)
    for i, found in zip(needed, torch.autograd.grad(out, [leaves[i] for i in needed], grad), strict=True):
        torch.testing.assert_close(found, full[1 + i])


@pytest.mark.slow
@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [None, 1, 3, 7])
@pytest.mark.parametrize(
    ("shape", "kind"),
    [((2, 4, 2, 1, 97, 64), "right"), ((2, 6, 1, 5, 63, 59), "row"), ((1, 2, 2, 16, 150, 80), "left")],
)
def test_decode_stays_within_the_error_budget(
    impl: str, shape: tuple[int, ...], kind: str, splits: int | None, dtype: torch.dtype
) -> None:
    skip_unserved(impl, dtype)
    decode = backends.launcher(impl, "gated_cross_attention_decode")
    low, mask = inputs(*shape, dtype=dtype), make_mask(kind, shape[0], shape[4])
    exact = reference.gated_cross_attention(*(x.double() for x in low), key_mask=mask)
    plain = reference.gated_cross_attention(*low, key_mask=mask)
    query, key, value, gate, residual = low
    found = decode(query, poison(key, mask), poison(value, mask), gate, residual, mask, None, splits=splits)
    within_budget(found, plain, exact, dtype)
    if kind == "row":
        assert torch.equal(found[0], residual[0])
    within_budget(
        decode(query, key, value, gate, None, None, 0.2, splits=splits),
        reference.gated_cross_attention(*low[:4], scale=0.2),
        reference.gated_cross_attention(*(x.double() for x in low[:4]), scale=0.2),
        dtype,
    )


@pytest.mark.slow
@every_backend
def test_decode_packs_more_rows_than_one_tile(impl: str) -> None:
    low = inputs(1, 10, 1, 16, 20, 16)  # 160 rows of one key/value head
    exact = reference.gated_cross_attention(*(x.double() for x in low))
    within_budget(
        backends.launcher(impl, "gated_cross_attention_decode")(*low, None, None, splits=2),
        reference.gated_cross_attention(*low),
        exact,
        torch.float32,
    )


@every_backend
def test_decode_serves_few_rows_without_gradient(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    original = backends.launcher

    def recorded(backend: str, function: str):
        calls.append(function)
        return original(backend, function)

    monkeypatch.setattr(backends, "launcher", recorded)
    for length, training, expected in (
        (1, False, "gated_cross_attention_decode"),
        (16, False, "gated_cross_attention_decode"),
        (17, False, "gated_cross_attention_forward"),
        (1, True, "gated_cross_attention_forward"),
    ):
        low = [x.requires_grad_(training) for x in inputs(1, 2, 2, length, 3, 16)]
        found = ops.gated_cross_attention(*low, impl=impl)
        torch.testing.assert_close(found, reference.gated_cross_attention(*low), atol=1e-5, rtol=1e-5)
        assert calls.pop() == expected and not calls
        assert found.requires_grad == training


@pytest.mark.slow
@every_backend
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    b=st.integers(1, 2), g=st.integers(1, 2), rep=st.integers(1, 3), t=st.integers(1, 20), s=st.integers(1, 40),
    d=st.integers(1, 40), kind=st.sampled_from(["none", "random", "left", "right", "row"]),
    scale=st.sampled_from([None, 0.25, -1.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_drawn_shapes_stay_within_the_error_budget(impl: str, b, g, rep, t, s, d, kind, scale, seed) -> None:
    low, mask = inputs(b, g * rep, g, t, s, d, seed=seed), make_mask(kind, b, s)
    grad = torch.randn(low[4].shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    exact, plain = exact_and_plain(low, mask, grad, scale)
    found = run(impl, low, mask, grad, scale)
    within_budget(found[0], plain[0], exact[0], torch.float32)
    query, key, value, gate, residual = low
    decoded = backends.launcher(impl, "gated_cross_attention_decode")(
        query, poison(key, mask), poison(value, mask), gate, residual, mask, scale, splits=1 + seed % 3
    )
    within_budget(decoded, plain[0], exact[0], torch.float32)
    assert all(torch.isfinite(gradient).all() for gradient in found)
    for a, c in zip(found[1:], exact[1:], strict=True):
        torch.testing.assert_close(a.double(), c, atol=2e-5, rtol=1e-4)


@every_backend
def test_float64_and_large_heads_are_left_to_torch(impl: str) -> None:
    low = [x.double() for x in inputs(1, 2, 1, 2, 3, 16)]
    with pytest.raises(BackendError, match=rf"impl='{impl}' cannot serve this call: float64 .*torch"):
        ops.gated_cross_attention(*low, impl=impl)
    torch.testing.assert_close(ops.gated_cross_attention(*low), reference.gated_cross_attention(*low))
    with pytest.raises(BackendError, match="head size 256, this is 257"):
        ops.gated_cross_attention(*inputs(1, 2, 1, 2, 3, 257), impl=impl)
