"""Cached decoding calls give the numbers of full calls, and only where they may answer at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from op_cases import Recorded, Subclass, Watching
from tiny import batch, tiny_model
from torch import Tensor, nn

from layalign import ops
from layalign.modeling.cache import SourceKeyValues
from layalign.modeling.cross_attention import OnePass, one_pass
from layalign.nn import GatedCrossAttention
from layalign.ops import backends
from layalign.ops.cached_launch import CachedDecode

IMPLS = [name for name in ("cpp", "cuda") if backends.capability(name, "cpu")[0]]


def decode_arguments() -> list[Any]:
    torch.manual_seed(0)
    query = torch.randn(2, 1, 4, 16).transpose(1, 2)
    key, value = torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 16)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return [query, key, value, torch.tensor([0.5]), torch.randn(2, 1, 4, 16), mask, None, "cpp"]


def split(arguments: list[Any]) -> tuple[Any, ...]:
    """The tensors, scale and impl."""
    return tuple(arguments[:6]), *arguments[6:]


def full_call(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor, residual: Tensor, mask: Any, scale: Any
) -> Tensor:
    return ops.gated_cross_attention(query, key, value, gate, residual, key_mask=mask, scale=scale, impl="torch")


def repeated(again: CachedDecode, arguments: Sequence[Any]) -> Tensor | None:
    """As SourceKeyValues calls it: prepared, then called."""
    query, key, value, gate, residual, mask, scale, impl = arguments
    return again(query, residual, scale) if again.prepare(key, value, gate, mask, impl) else None


@pytest.mark.skipif("cpp" not in IMPLS, reason="no C++ kernels here")
def test_a_cached_decode_is_the_full_call() -> None:
    arguments = decode_arguments()
    again = CachedDecode.after(*split(arguments))
    assert again is not None
    for step in range(3):
        arguments[0], arguments[4] = torch.randn(2, 1, 4, 16).transpose(1, 2), torch.randn(2, 1, 4, 16)
        arguments[3].fill_(step - 1.0)  # the gate's number is read again
        if step == 2:
            arguments[3] = arguments[3].clone()  # and the gate may be another tensor
        found = repeated(again, arguments)
        assert found is not None
        torch.testing.assert_close(found, full_call(*arguments[:7]), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif("cpp" not in IMPLS, reason="no C++ kernels here")
@pytest.mark.parametrize("kind", ["contiguous", "in pieces", "half precision"])
def test_a_cached_decode_overwrites_a_base_that_can_hold_the_result(kind: str) -> None:
    arguments = decode_arguments()
    bases = {"in pieces": torch.randn(2, 1, 4, 32)[..., :16], "half precision": arguments[4].half()}
    arguments[4] = bases.get(kind, arguments[4])
    query, key, value, gate, residual, mask, scale, impl = arguments
    expected, before = full_call(query, key, value, gate, residual.float(), mask, scale), residual.clone()
    again = CachedDecode.after((query, key, value, gate, residual, mask), scale, impl)
    assert again is not None and again.prepare(key, value, gate, mask, impl)
    kept = again(query, residual, scale)
    assert kept is not None and torch.equal(residual, before)  # unasked, it stays as it is
    found = again(query, residual, scale, overwrite=True)
    assert (found is residual) == (kind == "contiguous") and found is not None
    assert torch.equal(found, kept) and (found is residual or torch.equal(residual, before))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "grads", "trained", "moved"),
    [(1, False, False, True), (17, False, False, False), (1, True, False, False), (1, False, True, False)],
)
def test_a_decoding_step_brings_the_tokens_of_a_head_together(
    rows: int, grads: bool, trained: bool, moved: bool
) -> None:
    key, value = (torch.randn(2, 5, 2, 16).requires_grad_(trained).transpose(1, 2) for _ in range(2))
    module = GatedCrossAttention()
    torch.nn.init.constant_(module.adaption_gate, 0.5)
    other = torch.randn(2, 2, 5, 16)
    source = SourceKeyValues((1, 3), (other, key), (other, value), None)
    query, residual = torch.randn(2, 4, rows, 16), torch.randn(2, rows, 4, 16)
    with torch.set_grad_enabled(grads), one_pass(source, (module, module)) as one:
        found = one.attend(3, query, residual, None)
    torch.testing.assert_close(
        found, full_call(query, key, value, module.adaption_gate, residual, None, None), rtol=1e-5, atol=1e-5
    )
    assert source.keys[0] is source.values[0] is other
    assert torch.equal(source.keys[1], key) and torch.equal(source.values[1], value)
    assert source.keys[1].is_contiguous() == source.values[1].is_contiguous() == moved
    assert (source.keys[1] is key) == (not moved)


@pytest.mark.parametrize(("attention", "own"), [("sdpa", True), ("eager", False)])
def test_only_what_sdpa_returned_is_overwritten(monkeypatch: pytest.MonkeyPatch, attention: str, own: bool) -> None:
    asked: list[bool] = []
    attend = OnePass.attend

    def watched(*args: Any, overwrite: bool = False) -> Any:
        asked.append(overwrite)
        return attend(*args, overwrite=overwrite)

    monkeypatch.setattr(OnePass, "attend", watched)
    model = tiny_model(attention=attention)
    model(**batch(model=model))
    assert asked and set(asked) == {own}


@pytest.mark.skipif("cpp" not in IMPLS, reason="no C++ kernels here")
def test_a_cached_decode_leaves_other_calls_alone() -> None:
    arguments = decode_arguments()
    again = CachedDecode.after(*split(arguments))
    assert again is not None and repeated(again, arguments) is not None
    query, key, value, gate, residual, mask, scale, impl = arguments
    others = [
        [query[:, :, :, :8], key, value, gate, residual, mask, scale, impl],
        [query.double(), key, value, gate, residual, mask, scale, impl],
        [query.as_subclass(Subclass), key, value, gate, residual, mask, scale, impl],
        [torch.randn(2, 4, 1, 32)[..., ::2], key, value, gate, residual, mask, scale, impl],
        [query, key.clone(), value, gate, residual, mask, scale, impl],
        [query, key, value.clone(), gate, residual, mask, scale, impl],
        [query, key, value, gate, residual.double(), mask, scale, impl],
        [query, key, value, gate, torch._neg_view(residual), mask, scale, impl],
        [torch._neg_view(query), key, value, gate, residual, mask, scale, impl],
        [query, key, value, gate, residual, None, scale, impl],
        [query, key, value, gate, residual, mask, 0.1, impl],
        [query, key, value, gate, residual, mask, scale, "torch"],
        [query, key, value, gate.double(), residual, mask, scale, impl],
        [query, key, value, gate.as_subclass(Subclass), residual, mask, scale, impl],
        [query, key, value, torch._neg_view(gate), residual, mask, scale, impl],
        [query, key, value, None, residual, mask, scale, impl],
    ]
    assert [repeated(again, other) for other in others] == [None] * len(others)
    assert CachedDecode.after((query, key, value, gate, residual, mask), scale, "torch") is None
    for wide in ([query, key, value, gate.double(), residual], [query, key, value, gate, residual.double()]):
        assert CachedDecode.after((*wide, mask), scale, impl) is None
    assert CachedDecode.after((query, key, value, gate.to("meta"), residual, mask), scale, impl) is None
    many = torch.randn(2, 4, 17, 16)
    assert CachedDecode.after((many, key, value, gate, torch.randn(2, 17, 4, 16), mask), scale, "cpp") is None


def other_values(tensor: Tensor) -> Tensor:
    return ~tensor if tensor.dtype == torch.bool else tensor + 1


def emptied_and_filled(tensor: Tensor) -> None:
    """As FSDP does, with something else in the memory meanwhile."""
    values, storage = other_values(tensor), tensor.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    emptied_and_filled.between = torch.empty(size, dtype=torch.uint8)  # type: ignore[attr-defined]
    storage.resize_(size)
    tensor.copy_(values)


def turned(tensor: Tensor) -> None:
    """Other strides at the same address."""
    tensor.set_(tensor.untyped_storage(), 0, tensor.shape, (tensor.stride(0) - 1, *tensor.stride()[1:]))


def swapped_class(tensor: Tensor) -> None:
    torch.utils.swap_tensors(tensor, other_values(tensor).as_subclass(Subclass))


MOVES: dict[str, Callable[[Tensor], Any]] = {
    "data": lambda tensor: setattr(tensor, "data", other_values(tensor)),
    "set_": lambda tensor: tensor.set_(other_values(tensor)),
    "swap_tensors": lambda tensor: torch.utils.swap_tensors(tensor, other_values(tensor)),
    "swapped for a subclass": swapped_class,
    "emptied and filled": emptied_and_filled,
    "other strides": turned,
    "negated": lambda tensor: torch.utils.swap_tensors(tensor, torch._neg_view(tensor.clone())),
    "another type": lambda tensor: setattr(tensor, "data", tensor.data.view(torch.uint8)),
    "on no device": lambda tensor: torch.utils.swap_tensors(tensor, tensor.to("meta")),
}
MOVED = [
    (move, place)
    for move in MOVES
    for place in ("key", "value", "mask")
    if not (place == "mask" and move == "negated") and not (place != "mask" and move == "another type")
]


@pytest.mark.skipif("cpp" not in IMPLS, reason="no C++ kernels here")
@pytest.mark.parametrize(("move", "place"), MOVED)
def test_a_cached_decode_reads_no_memory_that_its_tensors_have_left(move: str, place: str) -> None:
    for between in (False, True):
        arguments = decode_arguments()
        again = CachedDecode.after(*split(arguments))
        assert again is not None and repeated(again, arguments) is not None
        query, key, value, gate, residual, mask, scale, impl = arguments
        at = arguments[("query", "key", "value", "gate", "residual", "mask").index(place)].data_ptr()
        tensor = {"key": key, "value": value, "mask": mask}[place]
        if between:  # a hook on another layer
            assert again.prepare(key, value, gate, mask, impl)
        MOVES[move](tensor)
        if not between:
            assert not again.prepare(key, value, gate, mask, impl) or again(query, residual, scale) is None
        elif tensor.data_ptr() != at:
            assert again(query, residual, scale) is None


@pytest.mark.skipif("cpp" not in IMPLS, reason="no C++ kernels here")
@pytest.mark.parametrize("move", ["data", "set_", "swap_tensors", "emptied and filled"])
def test_a_cached_decode_follows_its_gate(move: str) -> None:
    arguments = decode_arguments()
    again = CachedDecode.after(*split(arguments))
    query, key, value, gate, residual, mask, scale, impl = arguments
    assert again is not None and again.prepare(key, value, gate, mask, impl)
    MOVES[move](gate)
    found = again(query, residual, scale)
    assert found is not None
    torch.testing.assert_close(found, full_call(*arguments[:7]), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif("cpp" not in IMPLS, reason="no C++ kernels here")
@pytest.mark.parametrize(
    ("when", "move"),
    [
        (when, move)
        for when in ("between passes", "within a pass")
        for move in MOVES
        if move not in ("on no device", "another type") and (when, move) != ("within a pass", "other strides")
    ],
)
def test_a_pass_follows_states_that_moved(when: str, move: str) -> None:
    query, key, value, gate, residual, _, scale, _ = decode_arguments()
    module = GatedCrossAttention("cpp")
    torch.nn.init.constant_(module.adaption_gate, 0.5)
    other, more = key.clone(), value.clone()
    source = SourceKeyValues((1, 3), (other, key), (more, value), None)
    with torch.no_grad():
        for _ in range(2):
            with one_pass(source, (module, module)) as one:
                one.attend(1, query, residual, scale)
                one.attend(3, query, residual, scale)
        if when == "between passes":
            MOVES[move](key), MOVES[move](value)
        with one_pass(source, (module, module)) as one:
            one.attend(1, query, residual, scale)
            if when == "within a pass":
                MOVES[move](key), MOVES[move](value)
            found = one.attend(3, query, residual, scale)
    plain = [each.as_subclass(Tensor).resolve_neg() for each in (key, value)]
    wanted = full_call(query, *plain, gate, residual, None, scale)
    torch.testing.assert_close(found.as_subclass(Tensor), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif("cpp" not in IMPLS, reason="no C++ kernels here")
@pytest.mark.parametrize("grad", [False, True])
def test_a_pass_follows_a_source_that_got_other_states_within_it(grad: bool) -> None:
    query, key, value, gate, residual, mask, scale, _ = decode_arguments()
    module = GatedCrossAttention("cpp")
    torch.nn.init.constant_(module.adaption_gate, 0.5)
    source = SourceKeyValues((3,), (key,), (value,), mask)
    for _ in range(2):
        with torch.set_grad_enabled(grad), one_pass(source, (module,)) as one:
            one.attend(3, query, residual, scale)
    for name, states in (("keys", (key + 1,)), ("values", (value + 1,)), ("mask", mask.flip(0))):
        with torch.set_grad_enabled(grad), one_pass(source, (module,)) as one:
            setattr(source, name, states)
            found = one.attend(3, query, residual, scale)
        wanted = full_call(query, source.keys[0], source.values[0], gate, residual, source.mask, scale)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif("cpp" not in IMPLS, reason="no C++ kernels here")
def test_gradients_switched_on_within_a_pass_are_recorded() -> None:
    query, key, value, _, residual, mask, scale, _ = decode_arguments()
    module = GatedCrossAttention("cpp")
    source = SourceKeyValues((3,), (key,), (value,), mask)
    for grad in (False, False, True):
        with torch.no_grad(), one_pass(source, (module,)) as one, torch.set_grad_enabled(grad):
            found = one.attend(3, query, residual, scale)
    assert found.requires_grad


def test_a_source_that_decoded_in_inference_mode_trains_afterwards() -> None:
    key, value = (torch.randn(2, 5, 2, 16).transpose(1, 2) for _ in range(2))
    source, module = SourceKeyValues((3,), (key,), (value,), None), GatedCrossAttention()
    query, residual = torch.randn(2, 4, 1, 16), torch.randn(2, 1, 4, 16)
    with torch.inference_mode():
        OnePass(source, (module,)).attend(3, query, residual, None)
    assert source.keys[0].is_contiguous()
    OnePass(source, (module,)).attend(3, query, residual, None).sum().backward()
    assert module.adaption_gate.grad.abs() > 0


@contextmanager
def patched(module: nn.Module) -> Iterator[None]:
    module.forward = module.forward
    yield
    del module.forward


@contextmanager
def hooked(module: nn.Module) -> Iterator[None]:
    handle = module.register_forward_hook(lambda *_: None)
    yield
    handle.remove()


@pytest.mark.skipif("cpp" not in IMPLS, reason="no C++ kernels here")
def test_a_pass_goes_the_short_way_only_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, gate, residual, mask, scale, _ = decode_arguments()
    module = GatedCrossAttention("cpp")
    torch.nn.init.constant_(module.adaption_gate, 0.5)
    source = SourceKeyValues((3,), (key,), (value,), mask)
    short: list[bool] = []
    call = CachedDecode.__call__
    monkeypatch.setattr(CachedDecode, "__call__", lambda *given: short.append(True) or call(*given))

    def ran_short(within: Any, grad: bool = False) -> bool:
        short.clear()
        with torch.set_grad_enabled(grad), within, one_pass(source, (module,)) as one:
            found = one.attend(3, query, residual, scale)
            assert one.attend(2, query, residual, scale) is residual  # no language layer
        torch.testing.assert_close(
            found, full_call(query, key, value, gate, residual, mask, scale), rtol=1e-5, atol=1e-5
        )
        return bool(short)

    for watched in (Watching(), Recorded(), torch.profiler.profile(), hooked(module), patched(module), nullcontext()):
        ran_short(nullcontext())  # the pass that the next ones are like
        assert ran_short(nullcontext())
        assert not ran_short(watched, grad=isinstance(watched, nullcontext)), watched
    assert not ran_short(nullcontext())
    assert ran_short(nullcontext())
    with torch.no_grad():
        OnePass(source, (module,)).attend(3, query, residual, scale)  # outside a pass nothing was asked
        assert len(short) == 1
        with one_pass(source, (module,), seen=set()) as one:
            one.attend(3, query, residual, scale)
        assert one.seen == {3} and len(short) == 1


@pytest.mark.parametrize(("grad", "made"), [(False, 1), (True, 0)])
def test_nothing_is_cached_where_gradients_are_recorded(grad: bool, made: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no tensor needs one: such passes call in full, and each call would make its launch again."""
    query, key, value, _, residual, mask, scale, _ = decode_arguments()
    asked: list[Any] = []
    after = CachedDecode.after
    monkeypatch.setattr(CachedDecode, "after", lambda *given: asked.append(given) or after(*given))
    source, module = SourceKeyValues((3,), (key,), (value,), mask), GatedCrossAttention(gate=0.5)
    for _ in range(3):
        with torch.set_grad_enabled(grad), one_pass(source, (module,)) as one:
            one.attend(3, query, residual, scale)
    assert len(asked) == made or (not grad and not IMPLS)


@pytest.mark.skipif("cpp" not in IMPLS, reason="no C++ kernels here")
def test_autocast_is_part_of_the_kind() -> None:
    """A full call casts to its dtype; where nothing is to be cast it is the same call."""
    step = decode_arguments()
    small = [each.bfloat16() if isinstance(each, Tensor) and each.is_floating_point() else each for each in step]
    again = CachedDecode.after(*split(small))
    assert again is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert repeated(again, small) is None and CachedDecode.after(*split(step)) is None
        again = CachedDecode.after(*split(small))
        found = None if again is None else repeated(again, small)
        query, key, value, gate, residual, mask, scale, impl = small
        full = ops.gated_cross_attention(query, key, value, gate, residual, key_mask=mask, scale=scale, impl=impl)
        assert found is not None and torch.equal(found, full)
    assert again is not None and repeated(again, small) is None
