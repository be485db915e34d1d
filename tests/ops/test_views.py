"""Every tensor of every operation as every kind of view, on every backend: the kernels read strides, not luck.

Numbers are multiples of 1/4, so that no dtype rounds them: what differs is where a kernel reads, not how it rounds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from op_cases import DEVICE, serving
from torch import Tensor, nn

from layalign import ops, reference
from layalign.modeling import key_values
from layalign.modeling.cache import SourceKeyValues
from layalign.modeling.cross_attention import one_pass
from layalign.nn import GatedCrossAttention
from layalign.nn.aligner import WeightedLinearProjector
from layalign.ops import batched_linear, extension, packed_weight

BACKENDS = serving("layer_mix", "layer_projection", "gated_cross_attention")
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # Triton's interpreter computes bfloat16 wrongly
B, S, D, E, J, N, H, G, T = 2, 3, 4, 3, 4, 5, 2, 2, 2


def spread(tensor: Tensor, dim: int) -> Tensor:
    """Every second of twice as many along ``dim``, NaN between."""
    shape = list(tensor.shape)
    shape[dim] *= 2
    filler = True if tensor.dtype == torch.bool else torch.nan
    whole = torch.full(shape, filler, dtype=tensor.dtype, device=tensor.device)
    view = whole.unflatten(dim, (-1, 2)).select(dim % tensor.dim() + 1, 0) if shape[dim] else whole
    view.copy_(tensor)
    return view


def shifted(tensor: Tensor) -> Tensor:
    """One element after an address that is aligned."""
    view = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)[1:].view(tensor.shape)
    return view.copy_(tensor)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.permute(*reversed(range(tensor.dim()))).contiguous().permute(*reversed(range(tensor.dim())))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda t: t,
    "sliced": lambda t: spread(t, -1) if t.dim() else shifted(t),
    "rows": lambda t: spread(t, 0) if t.dim() else shifted(t),
    "transposed": transposed,
    "shifted": shifted,
    "one for all": lambda t: t.flatten()[:1].reshape((1,) * t.dim()).expand(t.shape) if t.numel() else t,
    "one row for all": lambda t: t[:1].expand(t.shape) if t.dim() else t,
    "one column for all": lambda t: t[..., :1].expand(t.shape) if t.dim() else t,
    "negated": lambda t: t if t.dtype == torch.bool else torch._neg_view(-t),
}
KINDS = list(VIEWS)
# Which view each argument gets: all the same, or by turns, so that each meets each among others.
ROUNDS = [*((kind,) for kind in KINDS[1:]), *((*KINDS[i:], *KINDS[:i]) for i in range(len(KINDS)))]
FEWER = [*ROUNDS[: len(KINDS)], ROUNDS[-3]]  # for Triton's interpreter, which is slow


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-8, 9, shape, generator=generator) / 4).to(DEVICE, dtype)


def dtypes(index: int) -> tuple[torch.dtype, torch.dtype]:
    """(of the states, of the parameters)"""
    full = torch.float32
    return [(full, full), (full, HALF), (HALF, full)][index % 3]


def as_views(tensors: Sequence[Tensor], kinds: Sequence[str]) -> list[Tensor]:
    found = [VIEWS[kinds[i % len(kinds)]](tensor).detach() for i, tensor in enumerate(tensors)]
    return [tensor.requires_grad_() if tensor.is_floating_point() else tensor for tensor in found]


def assert_like(found: Tensor | None, wanted: Tensor, dtype: torch.dtype, text: str) -> None:
    assert found is not None and found.shape == wanted.shape, text
    if wanted.numel():
        eps = max(torch.finfo(dtype).eps, torch.finfo(found.dtype).eps)
        largest = wanted.detach().abs().amax().clamp(min=1.0)
        assert (found.double() - wanted).detach().abs().amax() <= 16 * eps * largest, text


def check(
    function: Callable[..., Tensor],
    exact: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    kinds: Sequence[str],
    dtype: torch.dtype,
    calls: str = "plain, differentiated",
) -> None:
    """Result and gradients of ``function`` against those of ``exact`` in float64, with the gradient as a view too."""
    views = as_views(tensors, kinds)
    wide = [t.detach().resolve_neg().double().requires_grad_() if t.is_floating_point() else t for t in views]
    wanted = exact(*wide)
    grad = VIEWS[kinds[len(tensors) % len(kinds)]](draw(*wanted.shape, seed=99, dtype=dtype)).detach()
    if "plain" in calls:
        with torch.no_grad():
            assert_like(function(*views), wanted, dtype, f"{kinds}, without gradients")
    if "differentiated" not in calls:
        return
    found = function(*views)
    assert_like(found, wanted, dtype, f"{kinds}")
    leaves = [i for i, t in enumerate(views) if t.requires_grad]
    exacts = torch.autograd.grad(wanted, [wide[i] for i in leaves], grad.resolve_neg().double())
    gradients = torch.autograd.grad(found, [views[i] for i in leaves], grad)
    for i, one, two in zip(leaves, gradients, exacts, strict=True):
        assert_like(one, two, dtype, f"{kinds}, gradient of argument {i}")


def layers(dtype: torch.dtype, source: int = S) -> list[Tensor]:
    return [draw(B, source, D, seed=e, dtype=dtype) for e in range(E)]


@pytest.mark.slow
@pytest.mark.parametrize("source", [S, 0])
@pytest.mark.parametrize("impl", BACKENDS)
def test_layer_mix_reads_every_view(impl: str, source: int) -> None:
    def mix(*t: Tensor) -> Tensor:
        return ops.layer_mix(t[2:], t[0], t[1], impl=impl)

    triton = impl == "triton"  # whose gradients' forward is the plain one
    for index, kinds in enumerate(FEWER if triton else ROUNDS):
        states, own = dtypes(index)
        tensors = draw(J, E, seed=10, dtype=own), draw(J, seed=11, dtype=own), *layers(states, source)
        check(
            mix,
            lambda *t: reference.layer_mix(t[2:], t[0], t[1]),
            tensors,
            kinds,
            states,
            "differentiated" if triton else "plain, differentiated",
        )


@pytest.mark.parametrize("form", ["shared", "shared, bias per slot", "per slot, one bias", "per slot"])
@pytest.mark.parametrize("impl", BACKENDS)
def test_layer_projection_reads_every_view(impl: str, form: str) -> None:
    lead = (J,) if form.startswith("per slot") else ()
    bias = (J, N) if form in ("per slot", "shared, bias per slot") else (N,)

    def project(*t: Tensor, plan: str) -> Tensor:
        if impl == "triton":
            return torch.ops.layalign.layer_projection(t[4:], *t[:4], plan, impl)
        return ops.layer_projection(t[4:], *t[:4], impl=impl)

    triton = impl == "triton"  # whose gradients are the layer mix's
    for index, kinds in enumerate(FEWER if triton else ROUNDS):
        states, own = dtypes(index)
        tensors = (
            draw(J, E, seed=10, dtype=own), draw(J, seed=11, dtype=own),
            draw(*lead, N, D, seed=12, dtype=own), draw(*bias, seed=13, dtype=own), *layers(states),
        )  # fmt: skip
        exact = lambda *t: reference.layer_projection(t[4:], *t[:4])  # noqa: E731
        plan = "two_step" if form == "shared, bias per slot" else "fused"
        calls = "plain" if triton else "plain, differentiated"
        check(functools.partial(project, plan=plan), exact, tensors, kinds, states, calls)


@pytest.mark.slow
@pytest.mark.parametrize("source", [S, 0])
@pytest.mark.parametrize("impl", BACKENDS)
def test_gated_cross_attention_reads_every_view(impl: str, source: int) -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, residual: Tensor, mask: Tensor) -> Tensor:
        return ops.gated_cross_attention(query, key, value, gate, residual, key_mask=mask, impl=impl)

    def exact(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, residual: Tensor, mask: Tensor) -> Tensor:
        return reference.gated_cross_attention(query, key, value, gate, residual, key_mask=mask)

    for index, kinds in enumerate(FEWER if impl == "triton" else ROUNDS):
        states, own = dtypes(index)
        shape: tuple[int, ...] = [(), (1,), (1, 1)][index % 3]
        tensors = (
            draw(B, H, T, D, seed=1, dtype=states), draw(B, G, source, D, seed=2, dtype=states),
            draw(B, G, source, D, seed=3, dtype=states), draw(*shape, seed=4, dtype=own) + 1,
            draw(B, T, H, D, seed=5, dtype=own), draw(B, source, seed=6) > -1,
        )  # fmt: skip
        check(attend, exact, tensors, kinds, states)


def test_cached_calls_read_every_view() -> None:
    """The calls that :class:`SourceKeyValues` makes past the operation, in decoding and in training."""
    for kinds in ROUNDS:
        for grad in (False, True):
            query, key, value, residual = (
                draw(B, H, T, D, seed=1), draw(B, G, S, D, seed=2), draw(B, G, S, D, seed=3), draw(B, T, H, D, seed=5),
            )  # fmt: skip
            mask = draw(B, S, seed=6) > -1
            key, value, mask = as_views((key, value, mask), kinds)
            module = GatedCrossAttention(gate=0.75)
            states = SourceKeyValues((0,), (key.requires_grad_(grad),), (value.requires_grad_(grad),), mask)
            for step in range(3):
                views = as_views((query + step, residual + step), kinds)
                with torch.set_grad_enabled(grad), one_pass(states, (module,)) as one:
                    found = one.attend(0, *views, None)
                wide = [t.detach().resolve_neg().double() for t in (views[0], key, value, views[1])]
                gate = torch.tensor(0.75, dtype=torch.float64)
                wanted = reference.gated_cross_attention(*wide[:3], gate, wide[3], key_mask=mask)
                assert_like(found, wanted, torch.float32, f"{kinds}, call {step}, gradients {grad}")


@pytest.mark.skipif(not packed_weight.available(), reason="the C++ kernels are not there")
def test_batched_linear_reads_every_view() -> None:
    rows = 6
    for kinds in ROUNDS:
        plain = [
            *(draw(rows, D, seed=j) for j in range(J)), *(draw(N, D, seed=20 + j) for j in range(J)),
            *(draw(N, seed=30 + j) for j in range(J)), *(draw(rows, N, seed=40 + j) for j in range(J)),
        ]  # fmt: skip
        views = [view.detach() for view in as_views(plain, kinds)]
        x, weights, biases, grads = (views[i : i + J] for i in range(0, 4 * J, J))
        for j, found in enumerate(batched_linear.forward(x, weights, biases)):
            assert_like(found, x[j].double() @ weights[j].double().T + biases[j].double(), torch.float32, f"{kinds}")
        back = batched_linear.backward(grads, weights, torch.empty(J, rows, D))
        for j in range(J):
            assert_like(back[j], grads[j].double() @ weights[j].double(), torch.float32, f"{kinds}")
        whole = torch.stack([each.resolve_neg() for each in x])
        total = torch.zeros(D, N)
        if not any(grad.is_neg() for grad in grads):
            extension.layer_projection_backward(whole, grads, total[None])
            wanted = sum(x[j].double().T @ grads[j].double() for j in range(J))
            assert_like(total, wanted, torch.float32, f"{kinds}")


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("rows", [S, 80], ids=["few rows", "many rows"])
def test_grouped_projection_reads_every_view(folded: bool, rows: int) -> None:
    """:mod:`layalign.ops.grouped_projection`, with parameters that are views: tied to, or cut out of, a larger one."""

    lead = (J,) if folded else ()
    inner = draw(N, D, seed=14), draw(N, seed=15)

    def projected(*t: Tensor) -> Tensor:
        projector = WeightedLinearProjector.__new__(WeightedLinearProjector)
        nn.Module.__init__(projector)
        projector.impl, projector.structure, projector.times = "auto", "Linear", 1
        projector.fc1, projector.fc2 = nn.Linear(E, J), nn.Linear(D, N)
        weight, bias, *hidden = t[2:]
        for linear, own in ((projector.fc1, t[:2]), (projector.fc2, inner if folded else (weight, bias))):
            del linear.weight, linear.bias
            linear.weight, linear.bias = own
        return torch.stack(list(key_values.by_weights(projector, hidden, (weight, bias) if folded else None)))

    def exact(*t: Tensor) -> Tensor:
        return reference.layer_projection(t[4:], *t[:4])

    for kinds in ROUNDS:
        tensors = (
            draw(J, E, seed=10), draw(J, seed=11), draw(*lead, N, D, seed=12), draw(*lead, N, seed=13),
            *layers(torch.float32, rows),
        )  # fmt: skip
        check(projected, exact, tensors, kinds, torch.float32, "plain" if folded else "plain, differentiated")
