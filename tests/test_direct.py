"""A call goes straight to its kernels only where nothing would notice that its registered operation is skipped."""

from __future__ import annotations

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
    monkeypatch.setattr(_direct, "_WATCHERS", ())
    assert not _direct.unobserved([torch.ones(2)])
