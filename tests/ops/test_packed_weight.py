"""The C++ layer projection: mix and product at once, zeros left out; the same numbers, where it is to be taken."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import doubled, mix_inputs, within_budget
from tiny import batch, tiny_model

from layalign import ops, reference
from layalign.modeling import key_values
from layalign.nn.aligner import WeightedLinearProjector
from layalign.ops import backends, extension, packed_weight
from layalign.ops.packed_weight import PackedWeight

pytestmark = pytest.mark.skipif(
    not backends.capability("cpp", "cpu")[0] or not packed_weight.available(),
    reason="no C++ kernels for this machine here",
)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The kernel takes every call that it can, however small; how often it was called."""
    monkeypatch.setattr(packed_weight, "MIN_WORK", 0)
    monkeypatch.setattr(packed_weight, "MIN_ROWS", 0)
    monkeypatch.setattr(packed_weight, "COLUMNS_PER_LAYER", 0)
    calls: list[int] = []
    for name in ("layer_projection_forward", "layer_projection_backward"):
        real = getattr(extension, name)
        monkeypatch.setattr(extension, name, lambda *a, _real=real: (calls.append(1), _real(*a))[1])
    return calls


def case(shape: tuple[int, ...], per_slot: bool, seed: int = 0):
    """hidden, mix weight and bias, weight and bias, float32."""
    hidden, mix_weight, mix_bias, weight, bias = mix_inputs(*shape, dtype=torch.float32, seed=seed)
    if per_slot:
        generator = torch.Generator().manual_seed(seed + 1)
        weight = torch.randn((shape[1], *weight.shape), generator=generator)
        bias = torch.randn(weight.shape[:2], generator=generator)
    return hidden, mix_weight, mix_bias, weight, bias


@pytest.mark.parametrize("per_slot", [False, True], ids=["shared", "per-slot"])
@pytest.mark.parametrize(
    "shape", [(1, 2, 1, 1, 1), (5, 6, 2, 7, 11), (24, 64, 1, 3, 70), (3, 130, 1, 2, 40), (8, 24, 2, 63, 97)]
)
def test_results_and_gradients_within_the_error_budget(
    shape: tuple[int, ...], per_slot: bool, always: list[int]
) -> None:
    arguments = case(shape, per_slot)
    leaves = [*arguments[0], *arguments[1:]]
    for leaf in leaves:
        leaf.requires_grad_()
    found, plain = ops.layer_projection(*arguments, impl="cpp"), reference.layer_projection(*arguments)
    exact = reference.layer_projection(*doubled(arguments))
    within_budget(found.detach(), plain.detach(), exact.detach(), torch.float32)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    sets = [torch.autograd.grad(y, leaves, grad.to(y.dtype)) for y in (found, plain, exact)]
    for ours, usual, true in zip(*sets, strict=True):
        within_budget(ours, usual, true.double(), torch.float32)
    assert len(always) == 1 if per_slot else 2  # forward, and the weight's gradient where the slots share it


@settings(max_examples=25, deadline=None)
@given(
    e=st.integers(1, 12), count=st.integers(1, 8), b=st.integers(1, 3), s=st.integers(1, 70), d=st.integers(1, 130),
    n=st.integers(1, 300), per_slot=st.booleans(), shift=st.sampled_from([-3.0, 0.0, 3.0]),
)  # fmt: skip
def test_drawn_shapes_stay_within_the_error_budget(
    e: int, count: int, b: int, s: int, d: int, n: int, per_slot: bool, shift: float
) -> None:
    """``shift`` leaves few numbers of x over zero, half of them, or nearly all."""
    generator = torch.Generator().manual_seed(e * 97 + d)
    hidden = [torch.randn(b, s, d, generator=generator) for _ in range(e)]
    mix_weight, mix_bias = torch.randn(count, e, generator=generator), torch.full((count,), shift)
    weight = torch.randn((count, n, d) if per_slot else (n, d), generator=generator)
    arguments = hidden, mix_weight, mix_bias, weight, None
    found = torch.stack(list(packed_weight.project(*arguments)))
    exact = reference.layer_projection(*doubled(arguments))
    usual = (reference.layer_projection(*arguments).double() - exact).abs().max()
    sizes = [[layer.abs() for layer in hidden], *(t.abs() for t in (mix_weight, mix_bias, weight)), None]
    terms = reference.layer_projection(*doubled(sizes)).max()  # of sums that may cancel down to a single small result
    assert (found.double() - exact).abs().max() <= 2 * usual + torch.finfo(torch.float32).eps * terms


def test_views_are_read_and_every_result_is_written(always: list[int]) -> None:
    hidden, mix_weight, mix_bias, weight, bias = case((4, 6, 2, 7, 12), False)
    wide = torch.full((2, 9, 24), torch.nan)
    wide[:, 1:8, 5:17] = hidden[0]
    views = [
        wide[:, 1:8, 5:17],
        hidden[1].transpose(0, 1).contiguous().transpose(0, 1),
        hidden[2].transpose(1, 2).contiguous().transpose(1, 2),  # no unit last stride
        hidden[3],
    ]
    transposed = weight.T.contiguous().T
    outs = [torch.full((2, 7, 13), torch.nan) for _ in range(6)]
    packed_weight.project(views, mix_weight.T.contiguous().T, mix_bias.double(), transposed, bias[::1], outs)
    expected = reference.layer_projection(hidden, mix_weight, mix_bias, weight, bias)
    torch.testing.assert_close(torch.stack(outs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["weight", "hidden", "gradient"])
def test_infinities_and_nan_spread_as_in_torch(where: str, value: float, always: list[int]) -> None:
    """A zero of x times an infinity is NaN: it may not be left out then."""
    hidden, mix_weight, mix_bias, weight, bias = case((3, 4, 1, 20, 33), False)
    grad = torch.ones(4, 1, 20, 13)
    {"weight": weight, "hidden": hidden[1][0], "gradient": grad[2, 0]}[where][5, 7] = value
    results = []
    for impl in ("cpp", "torch"):
        leaf = weight.clone().requires_grad_()
        y = ops.layer_projection(hidden, mix_weight, mix_bias, leaf, bias, impl=impl)
        results.append((y.detach(), *torch.autograd.grad(y, leaf, grad)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert not torch.isfinite(results[0][1 if where == "gradient" else 0]).all()


def test_the_same_bits_on_any_number_of_threads_and_beside_any_other_rows(always: list[int]) -> None:
    before = torch.get_num_threads()
    hidden, mix_weight, mix_bias, weight, bias = case((8, 24, 2, 150, 97), True)
    few = [layer[1:, :3] for layer in hidden]
    leaf, results = weight[0].clone().requires_grad_(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            own = torch.stack(list(packed_weight.project(hidden, mix_weight, mix_bias, weight, bias)))
            y = ops.layer_projection(hidden, mix_weight, mix_bias, leaf, None, impl="cpp")
            results.append((own, y.detach(), *torch.autograd.grad(y.square().sum(), leaf)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))
    alone = torch.stack(list(packed_weight.project(few, mix_weight, mix_bias, weight, bias)))
    assert torch.equal(alone, results[0][0][:, 1:, :3])


def test_unpacking_gives_the_weights_that_were_packed() -> None:
    weight = torch.randn(3, 150, 40)
    packed = PackedWeight(3, 150, 40)
    packed.data.fill_(torch.nan)
    for slot in (2, 0, 1):
        packed.put(slice(slot, slot + 1), weight[slot : slot + 1])
    assert packed.finite and torch.isfinite(packed.data).all() and torch.equal(packed.dense(), weight)
    packed.put(slice(0, 1), torch.full((1, 150, 40), torch.inf))
    packed.put(slice(1, 2), weight[:1])
    assert not packed.finite


def test_weights_packed_for_another_instruction_set_are_packed_again() -> None:
    arguments = case((3, 4, 1, 9, 20), True)
    found = extension.module()
    best = found.instruction_set()
    if not found.use_instruction_set("baseline"):
        pytest.skip("one instruction set here")
    try:
        packed = PackedWeight.of(arguments[3])
    finally:
        found.use_instruction_set(best)
    assert packed.data.shape[-1] != found.packed_width()
    ours = torch.stack(list(packed_weight.project(*arguments[:3], packed, arguments[4])))
    torch.testing.assert_close(ours, reference.layer_projection(*arguments), rtol=1e-5, atol=1e-5)


def test_it_serves_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    def states(layers: int, width: int, rows: int = 64, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        return [torch.empty(1, rows, width, dtype=dtype)] * layers

    assert packed_weight.serves(states(8, 512), 768) and packed_weight.serves(states(24, 2048), 4096)
    assert not packed_weight.serves(states(24, 2048), 256)  # their states would be read more often than it is worth
    assert not packed_weight.serves(states(8, 512, dtype=torch.bfloat16), 768)
    assert not packed_weight.serves(states(8, 512), 768, torch.empty(1, dtype=torch.float64))
    shared, own = torch.empty(768, 512), torch.empty(24, 768, 512)
    assert packed_weight.pays(states(8, 512, 64), shared, 24) and not packed_weight.pays(states(8, 512, 4), shared, 24)
    assert packed_weight.pays(states(8, 512, 512), own, 24) and not packed_weight.pays(states(8, 512, 128), own, 24)
    monkeypatch.setattr(packed_weight, "available", lambda: False)
    assert not packed_weight.serves(states(8, 512), 768)


def projector(**changes) -> WeightedLinearProjector:
    torch.manual_seed(0)
    sizes = dict(num_encoder_layers=3, num_language_layers=2, encoder_hidden_dim=12, language_hidden_dim=10)
    return WeightedLinearProjector(SimpleNamespace(structure="Linear", **sizes), **changes)


def test_traced_and_watched_calls_do_not_go_past_the_dispatcher(always: list[int]) -> None:
    from torch._subclasses import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    module, hidden = projector(), [torch.randn(2, 5, 12) for _ in range(3)]
    key_values.by_weights(module, hidden)
    assert len(always) == 1
    with torch.no_grad():
        key_values.by_weights(module, hidden)
        assert len(always) == 2
        with Watching():
            key_values.by_weights(module, hidden)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = key_values.by_weights(module, [mode.from_tensor(layer) for layer in hidden])
    assert fake[0].shape == (2, 5, 10) and len(always) == 2
    with torch.profiler.profile():
        key_values.by_weights(module, hidden)
    assert len(always) == 3  # what is profiled is what runs


@pytest.mark.parametrize("impl", ["auto", "cpp", "torch"])
def test_a_model_folds_for_the_kernel_in_inference_alone(impl: str, always: list[int]) -> None:
    models = [tiny_model(llm="qwen2", fold_projections=fold, impl=impl) for fold in ("always", "never")]  # has biases
    inputs = batch(model=models[0])
    with torch.no_grad():
        first, second = (model(**inputs).loss for model in models)
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    taken = impl != "torch"
    assert isinstance(models[0].key_values._folded.weight, PackedWeight) == taken and bool(always) == taken
    grads = []
    for model in models:
        model(**inputs).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert isinstance(models[0].key_values._folded.weight, torch.Tensor)
    for one, other in zip(*grads, strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max().clamp(min=1e-3)
    with torch.no_grad():
        assert torch.equal(models[0](**inputs).loss, first)  # packed again, the same bits
        models[0].encoder_aligner.projector.fc2.weight.fill_(torch.inf)
        assert torch.isnan(models[0](**inputs).loss)


def described(value):
    """An argument as the extension takes it."""
    if isinstance(value, list):
        return [extension.describe(tensor) for tensor in value]
    return extension.describe(value) if isinstance(value, torch.Tensor) else value


def test_a_wrong_call_never_reaches_the_kernel() -> None:
    found = extension.module()
    width = found.packed_width()
    hidden, outs = [torch.randn(1, 3, 8)] * 2, [torch.empty(1, 3, 5)] * 4
    good = dict(hidden=hidden, mix=torch.randn(4, 2), mix_bias=torch.randn(4), packed=torch.randn(1, 1, 8, width))
    good |= dict(finite=True, bias=torch.randn(4, 5), outs=outs, threads=1)

    def call(**changes) -> None:
        given = good | changes
        found.layer_projection_forward(*map(described, given.values()))

    call()
    for message, changes in {
        r"hidden\[0\]: expected dtype code 0, got 1": dict(hidden=[hidden[0].half()] * 2),
        r"mix_weight: expected sizes \(4, 2\), got \(4, 3\)": dict(mix=torch.randn(4, 3)),
        r"mix_bias: expected sizes \(4\), got \(3\)": dict(mix_bias=torch.randn(3)),
        "packed: expected sizes": dict(packed=torch.randn(2, 1, 8, width)),
        "packed: expected dtype code 0": dict(packed=torch.randn(1, 1, 8, width).half()),
        "out: expected a tensor": dict(outs=outs[:3]),
        r"out: expected sizes \(1, 3, 5\)": dict(outs=[*outs[:3], torch.empty(1, 3, 4)]),
        "out: expected contiguous memory": dict(outs=[*outs[:3], torch.empty(1, 5, 3).mT]),
        r"bias: expected sizes \(4, 5\)": dict(bias=torch.randn(5)),
        "threads: expected at least one": dict(threads=0),
    }.items():
        with pytest.raises(found.Error, match=f"layer_projection: {message}"):
            call(**changes)
    x, grad, sums = torch.randn(2, 3, 8), torch.randn(3, 5), torch.zeros(1, 8, 5)
    for message, arguments in {
        "x: expected contiguous memory": (x.mT.contiguous().mT, [grad, grad], sums, 1),
        "grad: expected one per slot": (x, [grad], sums, 1),
        r"grad: expected sizes \(3, 5\)": (x, [grad, grad[:2]], sums, 1),
        r"dweight: expected sizes \(2, 8, 5\)": (x, [grad, None], torch.zeros(3, 8, 5), 1),
        "threads: expected at least one": (x, [grad, None], sums, 0),
    }.items():
        with pytest.raises(found.Error, match=f"layer_projection_backward: {message}"):
            found.layer_projection_backward(*map(described, arguments))
    with pytest.raises(found.Error, match="pack_weight: packed: expected sizes"):
        found.pack_weight(described(torch.randn(1, 5, 8)), described(torch.empty(1, 1, 9, width)), 1)
