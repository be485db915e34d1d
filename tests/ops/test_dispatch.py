"""A call goes straight to its kernels only where nothing would notice that its registered operation is skipped."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from op_cases import Recorded, Subclass, Watching
from tiny import batch, tiny_model
from torch import Tensor
from torch.autograd import forward_ad

from layalign import BackendError, ops
from layalign.ops import backends, cached_launch, checks, dispatch

IMPLS = [name for name in ("cpp", "cuda") if backends.capability(name, "cpu")[0]]
needs_kernels = pytest.mark.skipif(not IMPLS, reason="no compiled kernels here")


def tensors() -> tuple[list[Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, 3, 8) for _ in range(3)], torch.randn(4, 3), torch.randn(4)


CALLS: dict[str, Callable[[str], Tensor]] = {
    "layer_mix": lambda impl: ops.layer_mix(*tensors(), impl=impl),
    "layer_projection": lambda impl: ops.layer_projection(*tensors(), torch.ones(5, 8), impl=impl),
    "gated_cross_attention_decode": lambda impl: attention(2, impl),
    "gated_cross_attention": lambda impl: attention(20, impl),
}


def attention(length: int, impl: str) -> Tensor:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, rows, 16) for rows in (length, 5, 5))
    return ops.gated_cross_attention(query, key, value, torch.tensor(0.5), impl=impl)


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


@pytest.mark.parametrize("name", CALLS)
def test_functional_gradients_go_through_plain_torch(name: str) -> None:
    def loss(factor: Tensor, impl: str) -> Tensor:
        torch.manual_seed(0)
        hidden, mix, bias = tensors()
        query, key, value = (
            torch.randn(1, 2, rows, 16) * factor for rows in (2 if name == "gated_cross_attention_decode" else 20, 5, 5)
        )
        if name == "layer_mix":
            found = ops.layer_mix(hidden, mix * factor, bias, impl=impl)
        elif name == "layer_projection":
            found = ops.layer_projection(hidden, mix * factor, bias, torch.ones(5, 8) * factor, impl=impl)
        else:
            found = ops.gated_cross_attention(query, key, value, factor, impl=impl)
        return found.square().sum()

    factor = torch.tensor(0.5)
    wanted = factor.clone().requires_grad_()
    loss(wanted, "auto").backward()
    found = torch.func.grad(lambda f: loss(f, "auto"))(factor)
    torch.testing.assert_close(found, wanted.grad, rtol=1e-4, atol=1e-4)
    for impl in IMPLS:
        with pytest.raises(BackendError, match=r"functional transforms \(torch.func\) go through plain torch"):
            torch.func.grad(lambda f, impl=impl: loss(f, impl))(factor)


@pytest.mark.parametrize("fold", ["always", "never"])
def test_functional_gradients_of_a_model(fold: str) -> None:
    model = tiny_model()
    model.key_values.choice = fold
    inputs = batch(model=model)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    found = torch.func.grad(lambda ps: torch.func.functional_call(model, ps, (), inputs).loss)(trained)
    model(**inputs).loss.backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert grad.norm() > 0 or "gate" not in name
        assert (found[name] - grad).norm() <= 1e-4 * grad.norm(), name


@needs_kernels
def test_the_profiler_shows_the_operation() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        CALLS["gated_cross_attention_decode"](IMPLS[0])
    assert "layalign::gated_cross_attention_decode" in {event.key for event in profiled.key_averages()}


def test_the_dispatcher_is_not_skipped_where_something_watches() -> None:
    plain = torch.ones(2)
    assert dispatch.can_skip_dispatcher([plain, None, torch.nn.Parameter(plain, requires_grad=False)])
    assert not dispatch.can_skip_dispatcher([plain.as_subclass(Subclass)])
    parameter = torch.nn.Parameter(plain)
    assert not dispatch.can_skip_dispatcher([parameter])
    with torch.no_grad():
        assert dispatch.can_skip_dispatcher([parameter])
    for mode in (Watching(), Recorded(), torch.profiler.profile(), forward_ad.dual_level()):
        with mode:
            assert not dispatch.can_skip_dispatcher([plain]), mode
    assert dispatch.can_skip_dispatcher([plain])

    seen = []

    def inside(x: Tensor) -> Tensor:
        seen.append(dispatch.can_skip_dispatcher([plain]))
        return x

    assert not cached_launch.possible()  # gradients may be recorded
    with torch.no_grad():
        assert cached_launch.possible()
        for mode in (Watching(), torch.profiler.profile()):
            with mode:
                assert not cached_launch.possible(), mode

    torch.vmap(inside)(plain)
    torch.func.grad(lambda x: inside(x).sum())(plain)
    torch.jit.trace(inside, plain, check_trace=False)
    assert seen == [False, False, False]


def test_a_torch_without_these_hooks_loses_speed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_KNOWN", False)
    assert not dispatch.can_skip_dispatcher([torch.ones(2)])


def test_meta_tensors_give_the_results_shape() -> None:
    meta = functools.partial(torch.empty, device="meta", requires_grad=True)
    hidden = [meta(2, 3, 4)] * 5
    attended = meta(2, 4, 3, 8), meta(2, 2, 5, 8), meta(2, 2, 5, 8), meta(1), meta(2, 3, 4, 8)
    assert ops.layer_mix(hidden, meta(6, 5), meta(6)).shape == (6, 2, 3, 4)
    assert ops.layer_projection(hidden, meta(6, 5), None, meta(7, 4)).shape == (6, 2, 3, 7)
    assert ops.gated_cross_attention(*attended).shape == (2, 3, 4, 8)
