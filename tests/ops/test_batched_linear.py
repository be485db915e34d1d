"""Many linear maps in one C++ call give the numbers of plain torch."""

from __future__ import annotations

import pytest
import torch
from op_cases import within_budget

from layalign.ops import backends, batched_linear, extension, packed_weight
from layalign.utils.errors import BackendError

pytestmark = pytest.mark.skipif(
    not backends.capability("cpp", "cpu")[0] or not packed_weight.available(),
    reason="no C++ kernels for this machine here",
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many products each call of the kernel was given."""
    found: list[int] = []
    real = extension.batched_linear
    monkeypatch.setattr(extension, "batched_linear", lambda x, *a, **k: (found.append(len(x)), real(x, *a, **k))[1])
    return found


def case(slots: int, shape: tuple[int, ...], columns: int, depth: int, dtype=torch.float32, biased: bool = True):
    generator = torch.Generator().manual_seed(columns)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    x, weights = [draw(*shape, depth) for _ in range(slots)], [draw(columns, depth) for _ in range(slots)]
    return x, weights, [draw(columns) if biased and j % 2 else None for j in range(slots)]


SHAPES = [(1, (1,), 1, 1), (3, (2, 5), 7, 11), (2, (1, 130), 96, 200), (4, (300,), 65, 33), (2, (2, 8), 768, 512)]


@pytest.mark.parametrize("slots, shape, columns, depth", SHAPES)
def test_forward_and_backward_within_the_error_budget(slots, shape, columns, depth, calls: list[int]) -> None:
    x, weights, biases = case(slots, shape, columns, depth)
    found = batched_linear.forward(x, weights, biases)
    for j, y in enumerate(found):
        bias = biases[j]
        exact = torch.nn.functional.linear(*(None if t is None else t.double() for t in (x[j], weights[j], bias)))
        within_budget(y, torch.nn.functional.linear(x[j], weights[j], bias), exact, torch.float32)
    into = torch.full((slots, x[0][..., 0].numel(), depth), torch.nan)
    back = batched_linear.backward(found, weights, into)
    assert back is into and calls == [slots, slots]
    for j, y in enumerate(found):
        flat = y.flatten(0, -2)
        within_budget(back[j], flat @ weights[j], flat.double() @ weights[j].double(), torch.float32)


def test_views_are_read_and_a_missing_gradient_is_zero(calls: list[int]) -> None:
    x, weights, biases = case(4, (2, 6), 10, 8)
    expected = batched_linear.forward(x, weights, biases)
    strided = [each.mT.contiguous().mT for each in x]
    transposed = [torch.stack([w, w + 9], dim=-1)[..., 0] for w in weights]  # no unit stride
    assert not transposed[0].is_contiguous() and not strided[0].is_contiguous()
    wide = [torch.stack([b, b], dim=-1)[:, 0] if b is not None else None for b in biases]
    for one, other in zip(batched_linear.forward(strided, transposed, wide), expected, strict=True):
        assert torch.equal(one, other)
    grads = [
        None if j in (0, 2) else each.transpose(0, 1).contiguous().transpose(0, 1) for j, each in enumerate(expected)
    ]
    into = torch.full((4, 12, 8), torch.nan)
    batched_linear.backward(grads, weights, into)
    assert torch.equal(into[0], torch.zeros(12, 8)) and torch.equal(into[2], torch.zeros(12, 8))
    whole = batched_linear.backward(expected, weights, torch.empty(4, 12, 8))
    assert torch.equal(into[1], whole[1]) and torch.equal(into[3], whole[3])
    none = batched_linear.backward([None, None], weights[:2], torch.full((2, 3, 8), torch.nan))
    assert torch.equal(none, torch.zeros(2, 3, 8)) and calls == [4, 4, 2, 4]


def test_no_rows_or_no_depth_give_empty_results_or_the_bias() -> None:
    x, weights, biases = case(2, (0, 3), 5, 4)
    assert [y.shape for y in batched_linear.forward(x, weights, biases)] == [(0, 3, 5)] * 2
    x, weights, biases = case(2, (1, 3), 5, 0)
    found = batched_linear.forward(x, weights, biases)
    assert torch.equal(found[0], torch.zeros(1, 3, 5)) and torch.equal(found[1], biases[1].expand(1, 3, 5))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_infinities_and_nan_spread_as_in_torch(value: float) -> None:
    x, weights, biases = case(2, (4,), 70, 20, biased=False)
    x[0][2] = 0
    weights[0][3, 5] = value  # a zero times it is NaN
    found, plain = batched_linear.forward(x, weights, biases), x[0] @ weights[0].T
    torch.testing.assert_close(found[0], plain, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert found[0][2, 3].isnan() and bool(found[1].isfinite().all())


def test_a_rows_bits_depend_neither_on_its_neighbours_nor_on_the_threads() -> None:
    x, weights, biases = case(3, (77,), 100, 300)
    whole, threads = batched_linear.forward(x, weights, biases), torch.get_num_threads()
    parts = batched_linear.forward([each[13:14] for each in x], weights, biases)
    try:
        torch.set_num_threads(1)
        alone = batched_linear.forward(x, weights, biases)
    finally:
        torch.set_num_threads(threads)
    for j in range(3):
        assert torch.equal(whole[j], alone[j]) and torch.equal(whole[j][13:14], parts[j])


def test_what_the_kernel_cannot_take_is_left_to_torch(calls: list[int]) -> None:
    from torch._subclasses import FakeTensorMode

    for dtype in (torch.bfloat16, torch.float64):
        x, weights, biases = case(2, (3,), 6, 8, dtype)
        for y, each, weight, bias in zip(batched_linear.forward(x, weights, biases), x, weights, biases, strict=True):
            assert torch.equal(y, torch.nn.functional.linear(each, weight, bias))
        back = batched_linear.backward([None, x[1] @ weights[1].T], weights, torch.empty(2, 3, 8, dtype=dtype))
        assert torch.equal(back[1], x[1] @ weights[1].T @ weights[1]) and not back[0].any()
    x, weights, biases = case(2, (3,), 6, 8)
    batched_linear.forward(x, weights, biases, kernel=False)
    batched_linear.backward([y[:, :6] for y in x], weights, torch.empty(2, 3, 8), kernel=False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = batched_linear.forward([mode.from_tensor(each) for each in x], weights, biases)
    assert fake[0].shape == (3, 6) and calls == []


def test_a_wrong_call_never_reaches_the_kernel() -> None:
    x, weights, outs = [torch.randn(3, 8)] * 2, [torch.randn(5, 8)] * 2, [torch.empty(3, 5), torch.empty(3, 5)]
    extension.batched_linear(x, weights, [None, torch.randn(5)], outs, transposed=True)
    for message, changes in {
        "weight: expected one per matrix": dict(weights=weights[:1]),
        r"weight: expected sizes \(5, 8\), got \(8, 5\)": dict(weights=[weights[0], torch.randn(8, 5)]),
        r"x: expected sizes \(3, 8\)": dict(x=[x[0], torch.randn(4, 8)]),
        r"bias: expected sizes \(5\)": dict(biases=[None, torch.randn(6)]),
        "bias: expected dtype code 0": dict(biases=[None, torch.randn(5).half()]),
        r"out: expected sizes \(3, 5\)": dict(outs=[outs[0], torch.empty(3, 6)]),
        "out: expected a last stride of 1": dict(outs=[outs[0], torch.empty(5, 3).T]),
        "out: expected rows that do not overlap": dict(outs=[outs[0], torch.empty(1, 5).expand(3, 5)]),
    }.items():
        given = dict(x=x, weights=weights, biases=[None, None], outs=outs) | changes
        with pytest.raises(BackendError, match=f"batched_linear: {message}"):
            extension.batched_linear(**given, transposed=True)
