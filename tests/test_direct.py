"""A call goes straight to its kernels only where nothing would notice that its registered operation is skipped."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from layalign import ops
from layalign.nn import GatedCrossAttention
from layalign.ops import _direct, backends
from layalign.ops._repeated import RepeatedDecode
from layalign.source import SourceStates

IMPLS = [name for name in ("cpp", "cuda") if backends.capability(name, "cpu")[0]]
needs_kernels = pytest.mark.skipif(not IMPLS, reason="no compiled kernels here")


def tensors() -> tuple[list[Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, 3, 8) for _ in range(3)], torch.randn(4, 3), torch.randn(4)


CALLS: dict[str, Callable[[str], Tensor]] = {
    "layer_mix": lambda impl: ops.layer_mix(*tensors(), impl=impl),
    "layer_projection": lambda impl: ops.layer_projection(*tensors(), torch.ones(5, 8), impl=impl),
    "gated_decode": lambda impl: attention(2, impl),
    "gated_cross_attention": lambda impl: attention(20, impl),
}


def attention(length: int, impl: str) -> Tensor:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, rows, 16) for rows in (length, 5, 5))
    return ops.gated_cross_attention(query, key, value, torch.tensor(0.5), impl=impl)


class Recorded(TorchDispatchMode):
    """The names of the operations that the dispatcher sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@needs_kernels
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CALLS)
def test_the_same_numbers_either_way(name: str, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    direct = CALLS[name](impl)
    with Recorded() as recorded:
        registered = CALLS[name](impl)
    assert f"layalign::{name}" in recorded.names
    assert torch.equal(direct, registered)
    # And the first one was direct: with the registered operation broken it still answers.
    packet = getattr(torch.ops.layalign, name)
    monkeypatch.setattr(torch.ops.layalign, name, None)
    assert torch.equal(CALLS[name](impl), direct)
    monkeypatch.setattr(torch.ops.layalign, name, packet)


@needs_kernels
def test_the_profiler_shows_the_operation() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        CALLS["gated_decode"](IMPLS[0])
    assert "layalign::gated_decode" in {event.key for event in profiled.key_averages()}


class Subclass(Tensor):
    pass


class Watching(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_whoever_watches_is_seen() -> None:
    plain = torch.ones(2)
    assert _direct.unobserved([plain, None, torch.nn.Parameter(plain, requires_grad=False)])
    assert not _direct.unobserved([plain.as_subclass(Subclass)])
    parameter = torch.nn.Parameter(plain)
    assert not _direct.unobserved([parameter])
    with torch.no_grad():
        assert _direct.unobserved([parameter])
    for mode in (Watching(), Recorded(), torch.profiler.profile(), forward_ad.dual_level()):
        with mode:
            assert not _direct.unobserved([plain]), mode
    assert _direct.unobserved([plain])

    seen = []

    def inside(x: Tensor) -> Tensor:
        seen.append(_direct.unobserved([plain]))
        return x

    with torch.no_grad():
        assert _direct.quiet()
        for mode in (Watching(), torch.profiler.profile(), torch.autocast("cpu"), torch.enable_grad()):
            with mode:
                assert not _direct.quiet(), mode

    torch.vmap(inside)(plain)
    torch.func.grad(lambda x: inside(x).sum())(plain)
    torch.jit.trace(inside, plain, check_trace=False)
    assert seen == [False, False, False]


def test_a_torch_without_these_hooks_loses_speed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_direct, "_KNOWN", False)
    assert not _direct.unobserved([torch.ones(2)])


def decode_arguments() -> list[Any]:
    torch.manual_seed(0)
    query = torch.randn(2, 1, 4, 16).transpose(1, 2)
    key, value = torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 16)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return [query, key, value, torch.tensor([0.5]), torch.randn(2, 1, 4, 16), mask, None, "cpp"]


def full_call(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, base: Tensor, mask: Any, scale: Any) -> Tensor:
    return ops.gated_cross_attention(query, key, value, gate, base, key_mask=mask, scale=scale, impl="torch")


def repeated(again: RepeatedDecode, arguments: Sequence[Any]) -> Tensor | None:
    """As SourceStates calls it: prepared, then called."""
    query, key, value, gate, base, mask, scale, impl = arguments
    return again(query, base, scale) if again.prepare(key, value, gate, mask, impl) else None


@pytest.mark.skipif("cpp" not in IMPLS, reason="no C++ kernels here")
def test_a_repeated_decode_is_the_full_call() -> None:
    arguments = decode_arguments()
    again = RepeatedDecode.after(*arguments)
    assert again is not None
    for step in range(3):
        arguments[0], arguments[4] = torch.randn(2, 1, 4, 16).transpose(1, 2), torch.randn(2, 1, 4, 16)
        arguments[3].fill_(step - 1.0)  # the gate's number is read anew
        if step == 2:
            arguments[3] = arguments[3].clone()  # and the gate may be another tensor
        found = repeated(again, arguments)
        assert found is not None
        torch.testing.assert_close(found, full_call(*arguments[:7]), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif("cpp" not in IMPLS, reason="no C++ kernels here")
def test_a_repeated_decode_leaves_other_calls_alone() -> None:
    arguments = decode_arguments()
    again = RepeatedDecode.after(*arguments)
    assert again is not None and repeated(again, arguments) is not None
    query, key, value, gate, base, mask, scale, impl = arguments
    others = [
        [query[:, :, :, :8], key, value, gate, base, mask, scale, impl],
        [query.double(), key, value, gate, base, mask, scale, impl],
        [query.as_subclass(Subclass), key, value, gate, base, mask, scale, impl],
        [torch.randn(2, 4, 1, 32)[..., ::2], key, value, gate, base, mask, scale, impl],
        [query, key.clone(), value, gate, base, mask, scale, impl],
        [query, key, value.clone(), gate, base, mask, scale, impl],
        [query, key, value, gate, base.double(), mask, scale, impl],
        [query, key, value, gate, torch._neg_view(base), mask, scale, impl],
        [torch._neg_view(query), key, value, gate, base, mask, scale, impl],
        [query, key, value, gate, base, None, scale, impl],
        [query, key, value, gate, base, mask, 0.1, impl],
        [query, key, value, gate, base, mask, scale, "torch"],
        [query, key, value, gate.double(), base, mask, scale, impl],
        [query, key, value, gate.as_subclass(Subclass), base, mask, scale, impl],
        [query, key, value, torch._neg_view(gate), base, mask, scale, impl],
        [query, key, value, None, base, mask, scale, impl],
    ]
    assert [repeated(again, other) for other in others] == [None] * len(others)
    assert copy.deepcopy(again) is None and pickle.loads(pickle.dumps(again)) is None
    assert RepeatedDecode.after(query, key, value, gate, base, mask, scale, "torch") is None
    for wide in ([query, key, value, gate.double(), base], [query, key, value, gate, base.double()]):
        assert RepeatedDecode.after(*wide, mask, scale, impl) is None
    assert RepeatedDecode.after(query, key, value, gate.to("meta"), base, mask, scale, impl) is None
    many = torch.randn(2, 4, 17, 16)
    assert RepeatedDecode.after(many, key, value, gate, torch.randn(2, 17, 4, 16), mask, scale, "cpp") is None


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
    query, key, value, gate, base, mask, scale, _ = decode_arguments()
    module = GatedCrossAttention("cpp")
    torch.nn.init.constant_(module.adaption_gate, 0.5)
    source = SourceStates((3,), (key,), (value,), mask, (module,))
    short: list[bool] = []
    call = RepeatedDecode.__call__
    monkeypatch.setattr(RepeatedDecode, "__call__", lambda *given: short.append(True) or call(*given))

    def ran_short(within: Any, grad: bool = False) -> bool:
        short.clear()
        with torch.set_grad_enabled(grad), within, source.one_pass():
            found = source.attend(3, query, base, scale)
            assert source.attend(2, query, base, scale) is base  # no language layer
        torch.testing.assert_close(found, full_call(query, key, value, gate, base, mask, scale), rtol=1e-5, atol=1e-5)
        return bool(short)

    for watched in (Watching(), Recorded(), torch.profiler.profile(), hooked(module), patched(module), nullcontext()):
        ran_short(nullcontext())  # the pass that the next ones are like
        assert ran_short(nullcontext())
        assert not ran_short(watched, grad=isinstance(watched, nullcontext)), watched
    assert not ran_short(nullcontext())
    assert ran_short(nullcontext())
    with torch.no_grad():
        source.attend(3, query, base, scale)  # outside a pass nothing was asked
        assert len(short) == 1
        source.seen = set()
        with source.one_pass():
            source.attend(3, query, base, scale)
        assert source.seen == {3} and len(short) == 1
