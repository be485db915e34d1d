"""A call goes straight to its kernels only where nothing would notice that its registered operation is skipped."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from layalign import ops
from layalign.ops import _direct, backends
from layalign.ops._repeated import RepeatedDecode

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
    pass


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


@pytest.mark.skipif("cpp" not in IMPLS, reason="no C++ kernels here")
def test_a_repeated_decode_is_the_full_call() -> None:
    arguments = decode_arguments()
    again = RepeatedDecode.after(*arguments)
    assert again is not None
    for step in range(3):
        arguments[0], arguments[4] = torch.randn(2, 1, 4, 16).transpose(1, 2), torch.randn(2, 1, 4, 16)
        arguments[3].fill_(step - 1.0)  # the gate's number is read anew
        found = again(*arguments)
        assert found is not None
        torch.testing.assert_close(found, full_call(*arguments[:7]), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif("cpp" not in IMPLS, reason="no C++ kernels here")
def test_a_repeated_decode_leaves_other_calls_alone() -> None:
    arguments = decode_arguments()
    again = RepeatedDecode.after(*arguments)
    assert again is not None and again(*arguments) is not None
    query, key, value, gate, base, mask, scale, impl = arguments
    others = [
        [query[:, :, :, :8], key, value, gate, base, mask, scale, impl],
        [query.double(), key, value, gate, base, mask, scale, impl],
        [torch.randn(2, 4, 1, 32)[..., ::2], key, value, gate, base, mask, scale, impl],
        [query, key.clone(), value, gate, base, mask, scale, impl],
        [query, key, value.clone(), gate, base, mask, scale, impl],
        [query, key, value, gate, base.double(), mask, scale, impl],
        [query, key, value, gate, base, None, scale, impl],
        [query, key, value, gate, base, mask, 0.1, impl],
        [query, key, value, gate, base, mask, scale, "torch"],
        [query, key, value, torch.nn.Parameter(gate), base, mask, scale, impl],
        [query, key, value, gate.double(), base, mask, scale, impl],
    ]
    assert [again(*other) for other in others] == [None] * len(others)
    with torch.autocast("cpu"):
        assert again(*arguments) is None
    with Recorded():
        assert again(*arguments) is None
    assert copy.deepcopy(again) is None and pickle.loads(pickle.dumps(again)) is None
    assert RepeatedDecode.after(query, key, value, gate, base, mask, scale, "torch") is None
    for wide in ([query, key, value, gate.double(), base], [query, key, value, gate, base.double()]):
        assert RepeatedDecode.after(*wide, mask, scale, impl) is None
    many = torch.randn(2, 4, 17, 16)
    assert RepeatedDecode.after(many, key, value, gate, torch.randn(2, 17, 4, 16), mask, scale, "cpp") is None
