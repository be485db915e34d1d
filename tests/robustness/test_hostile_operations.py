"""The operations under arguments nobody should pass: the reference's result, or an error that names the argument.

Hypothesis draws a call that is right and one or two things wrong with it (bad_tensors.py). What comes back is compared
with the float64 reference under the error budget of the other tests, gradients too.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from bad_inputs import times, tried
from bad_tensors import HARMFUL, HARMLESS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from layalign import ArgumentError, BackendError, ops, reference
from layalign.ops import backends, packed_weight

SCALARS = [None, 0.3, -2.0, 0.0, 3, 1e-45, 1e30, -1e38, 1e39, float("nan"), float("inf"), "0.5", True, 10**400, 1j, [1]]
IMPLS = ["auto", *(name for name in backends.names() if name != "triton")]
WRONG_IMPLS = ["", "Torch", "cpp ", None, 0, ["torch"], b"cpp", torch.ones(2)]
NO_MEMORY = re.compile(r"allocate|memory|overflow|exceeds|too large|invalid size|storage", re.IGNORECASE)
REFERENCES = {
    "layer_mix": reference.layer_mix,
    "layer_projection": reference.layer_projection,
    "gated_cross_attention": reference.gated_cross_attention,
}
slow = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def small_calls_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C++ layer projection takes whatever it can, not only what is worth its call."""
    for limit in ("MIN_WORK", "MIN_ROWS", "COLUMNS_PER_LAYER"):
        monkeypatch.setattr(packed_weight, limit, 0)


def served(impl: str) -> bool:
    return impl == "auto" or backends.capability(impl, "cpu")[0]


def sizes(draw: st.DrawFn, **ranges: tuple[int, int]) -> dict[str, int]:
    return {name: draw(st.integers(*limits)) for name, limits in ranges.items()}


def right_call(draw: st.DrawFn, operation: str) -> dict[str, Any]:
    """Arguments by name that the operation takes, sizes of zero among them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16]))

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    if operation == "gated_cross_attention":
        n = sizes(draw, b=(0, 2), g=(1, 2), r=(0, 2), t=(0, 18), s=(0, 9), d=(1, 9))
        b, g, t, s, d = n["b"], n["g"], n["t"], n["s"], n["d"]
        call = dict(query=new(b, g * n["r"], t, d), key=new(b, g, s, d), value=new(b, g, s, d), gate=new(1))
        call["residual"] = new(b, t, g * n["r"], d) if draw(st.booleans()) else None
        call["key_mask"] = new(b, s) > 0 if draw(st.booleans()) else None
        call["scale"] = draw(st.sampled_from(SCALARS)) if draw(st.integers(0, 9)) == 0 else None
        return call
    n = sizes(draw, e=(1, 4), j=(0, 5), b=(0, 2), s=(0, 5), d=(0, 9), o=(0, 4))
    hidden = [new(n["b"], n["s"], n["d"]) for _ in range(n["e"])]
    prefix = "" if operation == "layer_mix" else "mix_"
    bias = new(n["j"]) if draw(st.booleans()) else None
    call = {"hidden": hidden, f"{prefix}weight": new(n["j"], n["e"]), f"{prefix}bias": bias}
    if operation == "layer_projection":
        lead = (n["j"],) if draw(st.booleans()) else ()
        call["weight"] = new(*lead, n["o"], n["d"])
        call["bias"] = draw(st.sampled_from([None, new(n["o"]), new(n["j"], n["o"])]))
    return call


@st.composite
def calls(draw: st.DrawFn, operation: str) -> tuple[dict[str, Any], list[str]]:
    """A call, and what was done to it."""
    call = right_call(draw, operation)
    done = []
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from([name for name in call if name != "scale"]))
        kind = draw(st.sampled_from([*HARMLESS, *HARMFUL, *(("alias",) * 3)]))
        change = {**HARMLESS, **HARMFUL}.get(kind)
        value, index = call[name], None
        if name == "hidden" and isinstance(value, list) and value and draw(st.booleans()):
            index = draw(st.integers(0, len(value) - 1))
            value = value[index]
        if kind == "alias":
            value = alias(call, name, value)
        elif isinstance(value, list):
            value = [changed(change, layer) for layer in value]
            value = draw(st.sampled_from([value, value, [], tuple(value), iter(value), [*value, *value]]))
        else:
            value = changed(change, value)
        if index is None:
            call[name] = value
        else:
            call[name] = [*call[name][:index], value, *call[name][index + 1 :]]
        done.append(f"{name}: {kind}")
    for tensor in every_tensor(call):
        if draw(st.integers(0, 3)) == 0 and tensor.is_leaf and (tensor.is_floating_point() or tensor.is_complex()):
            tensor.requires_grad_()
    return call, done


def changed(change: Any, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    try:
        return change(value)
    except (RuntimeError, ValueError, NotImplementedError, IndexError):
        return value  # there is no such tensor of this shape


def alias(call: dict[str, Any], name: str, value: Any) -> Any:
    """Another argument's tensor, or a view of its memory where the shapes differ."""
    for other in every_tensor(call):
        strided = isinstance(value, Tensor) and not value.is_nested and value.layout is torch.strided
        if strided and other is not value and other.layout is torch.strided and not other.is_nested:
            if other.shape == value.shape:
                return other
            if other.dtype == value.dtype and other.numel() >= value.numel() and not other.is_quantized:
                return other.detach().reshape(-1)[: value.numel()].view(value.shape)
    return value


def every_tensor(call: dict[str, Any]) -> list[Tensor]:
    flat = [part for value in call.values() for part in (value if isinstance(value, (list, tuple)) else [value])]
    return [part for part in flat if isinstance(part, Tensor)]


def plain(value: Any, dtype: torch.dtype | None) -> Any:
    """The same values in memory of their own."""
    if isinstance(value, (list, tuple)):
        return [plain(part, dtype) for part in value]
    if not isinstance(value, Tensor):
        return value
    value = torch.empty_like(value).copy_(value.detach()).contiguous()
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value


def attends_by_infinities(call: dict[str, Any]) -> bool:
    """Whether some row's attended scores are all -inf: a softmax gives NaN, the CUDA kernels "nothing attended"."""
    query, key = (plain(call[name], torch.float64) for name in ("query", "key"))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scale = query.shape[-1] ** -0.5 if call.get("scale") is None else float(call["scale"])
    scores = query @ key.transpose(-1, -2) * scale
    if call.get("key_mask") is not None:
        scores = scores.masked_fill(~call["key_mask"].bool()[:, None, None, :], -float("inf"))
    return bool((scores == -float("inf")).all(-1).any())


def same(found: Tensor, low: Tensor, exact: Tensor, extreme: bool) -> None:
    """Equal to the exact result, no worse than twice plain torch in the same dtype; not finite where that is not.

    Where scores are `extreme`, those of the kernels (to base 2) overflow to NaN a little earlier than torch's.
    """
    assert found.shape == exact.shape and found.dtype == low.dtype
    where = exact.to(found.dtype).isfinite() & low.isfinite()  # elsewhere a number of this dtype overflows
    nan = exact.isnan()
    assert found[nan].isnan().all(), "a number where the reference has NaN"
    assert not found[exact.isinf()].isfinite().any()
    assert extreme or found[where].isfinite().all(), "not finite where the reference is"
    where &= found.isfinite()
    if where.any():
        floor = torch.finfo(found.dtype).eps * exact[where].abs().max()
        budget = 2 * (low.double() - exact)[where].abs().max() + 2 * floor + 4 * torch.finfo(found.dtype).tiny
        assert ((found.double() - exact)[where].abs().max()) <= budget


def check(operation: str, call: dict[str, Any], impl: Any) -> str:
    """Run the call and judge what comes back: "result", "error" or "no memory"."""
    function = getattr(ops, operation)
    try:
        found, error = function(**call, impl=impl), None
    except (ArgumentError, BackendError, RuntimeError) as caught:
        found, error = None, caught
    if isinstance(error, (ArgumentError, BackendError)):
        names = (*call, "impl", "query, key", operation)
        assert re.match(rf"({'|'.join(map(re.escape, names))})(\[\d+\])?: ", str(error)), error
        assert "\n" not in str(error) and len(str(error)) < 500
        return "error"
    if error is not None:
        # No memory for a result of such a size: torch's own error, as its users catch it.
        assert NO_MEMORY.search(str(error)) and max(t.numel() for t in every_tensor(call)) > 2**40, error
        return "no memory"
    query = call["query"] if operation == "gated_cross_attention" else call["hidden"][0]
    if any(tensor.is_meta for tensor in every_tensor(call)) or max(t.numel() for t in every_tensor(call)) > 2**40:
        assert found.is_meta or not found.numel()  # no values to compare
        return "result"
    values = {name: value for name, value in call.items() if name != "scale"}
    scale = {"scale": call["scale"]} if "scale" in call else {}
    exact = REFERENCES[operation](**{n: plain(v, torch.float64) for n, v in values.items()}, **scale)
    low = REFERENCES[operation](**{n: plain(v, query.dtype) for n, v in values.items()}, **scale)
    floating = [tensor for tensor in every_tensor(call) if tensor.is_floating_point()]
    extreme = abs(call.get("scale") or 0) > 1e30 or any(bool((t.double().abs() > 1e30).any()) for t in floating)
    if impl == "cuda" and operation == "gated_cross_attention" and exact.isnan().any() and attends_by_infinities(call):
        return "result"  # a known difference: test_an_infinite_key_in_the_cuda_kernels
    same(found.detach(), low, exact, extreme)
    if exact.isfinite().all() and not extreme:  # behind a NaN the kernels' relu lets no gradient through, torch's does
        gradients(operation, call, found)
    return "result"


def gradients(operation: str, call: dict[str, Any], found: Tensor) -> None:
    wanted = list({id(t): t for t in every_tensor(call) if t.requires_grad}.values())
    if not wanted or not found.requires_grad:
        assert not wanted or not found.numel() or not found.requires_grad
        return
    grad = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view(found.shape)
    got = torch.autograd.grad(found, wanted, grad.to(found.dtype), allow_unused=True)

    def again(dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        floating = [tensor for tensor in every_tensor(call) if tensor.is_floating_point()]
        copies = {id(t): t.detach().to(dtype).requires_grad_(t.requires_grad) for t in floating}

        def of(value: Any) -> Any:
            return [of(part) for part in value] if isinstance(value, (list, tuple)) else copies.get(id(value), value)

        result = REFERENCES[operation](**{name: of(value) for name, value in call.items()})
        leaves = [copies[id(t)] for t in wanted]
        return torch.autograd.grad(result, leaves, grad.to(result.dtype), allow_unused=True)

    kind = found.dtype
    for one, low, exact in zip(got, again(kind), again(torch.float64), strict=True):
        assert (one is None) == (exact is None)
        if one is None or exact is None or low is None or not exact.numel():
            continue
        if exact.isfinite().all() and low.isfinite().all():
            assert one.isfinite().all()
            coarse = max(torch.finfo(kind).eps, torch.finfo(one.dtype).eps)
            floor = coarse * (exact.abs().max() + 1)  # terms of about 1 may cancel
            budget = 4 * (low.double() - exact).abs().max() + 32 * floor
            assert (one.double() - exact).abs().max() <= budget + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("operation", list(REFERENCES))
def test_a_bad_call_gives_the_reference_or_names_the_argument(operation: str, impl: str) -> None:
    if not served(impl):
        pytest.skip(f"{impl} is not available here")
    outcomes: dict[str, int] = {}
    count = times(60 if impl == "cuda" else 250)

    @settings(slow, max_examples=count)
    @given(calls(operation))
    def run(drawn: tuple[dict[str, Any], list[str]]) -> None:
        outcome = check(operation, drawn[0], impl)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1

    run()
    tried("calls of an operation", sum(outcomes.values()))
    assert outcomes["result"] > count / 8 and outcomes["error"] > count / 8


def test_an_infinite_key_in_the_cuda_kernels() -> None:
    """Where every score is -inf they give 0 where torch has NaN (docs/backends.md says so); +inf gives NaN in both."""
    if not served("cuda"):
        pytest.skip("cuda is not available here")
    query, value, gate = torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), torch.ones(1)
    for infinity, expected in ((-float("inf"), 0.0), (float("inf"), float("nan"))):
        key = torch.tensor([[[[1.0, infinity]]]])
        found = ops.gated_cross_attention(query, key, value, gate, impl="cuda")
        torch.testing.assert_close(found, torch.full((1, 1, 1, 2), expected), equal_nan=True)
        assert ops.gated_cross_attention(query, key, value, gate, impl="torch").isnan().all()
        tried("calls of an operation")


@pytest.mark.parametrize("operation", list(REFERENCES))
def test_a_wrong_backend_is_named(operation: str) -> None:
    call = {
        "layer_mix": lambda **k: ops.layer_mix([torch.ones(1, 2, 3)], torch.ones(2, 1), **k),
        "layer_projection": lambda **k: ops.layer_projection(
            [torch.ones(1, 2, 3)], torch.ones(2, 1), None, torch.ones(4, 3), **k
        ),
        "gated_cross_attention": lambda **k: ops.gated_cross_attention(
            *[torch.ones(1, 1, 2, 3)] * 3, torch.ones(1), **k
        ),
    }[operation]
    for impl in WRONG_IMPLS:
        with pytest.raises(ArgumentError, match="impl: expected 'auto' or one of"):
            call(impl=impl)
        tried("calls of an operation")


@pytest.mark.parametrize("impl", [name for name in backends.names() if name != "torch"])
def test_a_lazily_negated_view_is_read_with_its_sign(impl: str) -> None:
    """Its memory holds the opposite: the kernels read memory."""
    if not served(impl):
        pytest.skip(f"{impl} is not available here")
    negated = lambda *shape: torch.randn(*shape, dtype=torch.complex64).conj().imag  # noqa: E731
    hidden, weight = [negated(1, 2, 4) for _ in range(2)], negated(2, 2)
    assert hidden[0].is_neg()
    torch.testing.assert_close(ops.layer_mix(hidden, weight, impl=impl), reference.layer_mix(hidden, weight))
    inputs = [negated(1, 1, 2, 16), negated(1, 1, 3, 16), negated(1, 1, 3, 16), negated(1)]
    expected = reference.gated_cross_attention(*inputs)
    torch.testing.assert_close(ops.gated_cross_attention(*inputs, impl=impl), expected)
    tried("calls of an operation", 2)


@pytest.mark.parametrize("impl", [name for name in backends.names() if name != "torch"])
def test_rows_that_lie_beyond_32_bits(impl: str) -> None:
    """Offsets above 2^31 elements: four gigabytes of addresses, of which a few pages are touched."""
    if not served(impl):
        pytest.skip(f"{impl} is not available here")
    try:
        memory = torch.empty(2**31 + 2**16, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("no four gigabytes of addresses")
    far = lambda *shape: torch.as_strided(memory, shape, [0] * (len(shape) - 2) + [2**31, 1])  # noqa: E731
    hidden, query = far(1, 2, 16), far(1, 1, 2, 16)
    query.copy_(torch.randn(1, 1, 2, 16))
    weight = torch.randn(2, 1, dtype=torch.float16)
    near, close = hidden.clone(), query.clone()
    torch.testing.assert_close(ops.layer_mix([hidden], weight, impl=impl), ops.layer_mix([near], weight, impl=impl))
    gate = torch.ones(1)
    expected = ops.gated_cross_attention(close, close, close, gate, impl=impl)
    torch.testing.assert_close(ops.gated_cross_attention(query, query, query, gate, impl=impl), expected)
    tried("calls of an operation", 2)


def test_the_result_has_the_dtype_of_the_query_whatever_the_base_and_the_gate() -> None:
    states = torch.ones(1, 1, 2, 4)
    for impl in [name for name in IMPLS if served(name)]:
        for gate in (torch.ones(()), torch.ones(1), torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)):
            residual = torch.ones(1, 2, 1, 4, dtype=torch.float64)
            found = ops.gated_cross_attention(states, states, states, gate, residual, impl=impl)
            assert found.dtype == torch.float32 and torch.equal(found, torch.full((1, 2, 1, 4), 2.0))
            tried("calls of an operation")


def test_sizes_that_cannot_be_addressed_are_named() -> None:
    huge = torch.zeros(1, 1, 1).expand(2**30, 2**30, 1)
    with pytest.raises(ArgumentError, match="hidden: expected sizes whose result can be addressed"):
        ops.layer_mix([huge], torch.ones(2, 1))
    narrow = torch.zeros(1, 1, 1).expand(2**30, 2**20, 1)
    with pytest.raises(ArgumentError, match="weight: expected sizes whose result can be addressed"):
        ops.layer_projection([narrow], torch.ones(2, 1), None, torch.zeros(1, 1).expand(2**20, 1))
    states = torch.zeros(1, 1, 1, 1).expand(2**20, 2**20, 2**20, 1)
    with pytest.raises(ArgumentError, match="query, key: expected sizes whose result can be addressed"):
        ops.gated_cross_attention(states, states, states, torch.ones(1))
    tried("calls of an operation", 3)
