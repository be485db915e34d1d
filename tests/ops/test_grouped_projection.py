"""The layer mix and the projection slot by slot: the numbers and gradients of the whole operation, in any grouping."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import batch, tiny_model
from torch import Tensor, nn

from layalign import reference
from layalign.modeling import key_values
from layalign.modeling.key_values import _fold
from layalign.nn.aligner import WeightedLinearProjector
from layalign.ops import grouped_projection

E, L, D_E, D_L, D_KV = 3, 2, 12, 10, 6
FORMS = ["shared", "folded", "in-two-steps"]


def parts(dtype: torch.dtype = torch.float64, bias: bool = True, hidden_grad: bool = True):
    """(projector, hidden, outer maps)."""
    torch.manual_seed(0)
    config = SimpleNamespace(
        structure="Linear",
        num_encoder_layers=E,
        num_language_layers=L,
        encoder_hidden_dim=D_E,
        language_hidden_dim=D_L,
    )
    projector = WeightedLinearProjector(config, bias=bias).to(dtype)
    hidden = [torch.randn(2, 5, D_E, dtype=dtype, requires_grad=hidden_grad) for _ in range(E)]
    outer = [nn.Linear(D_L, D_KV).to(dtype).requires_grad_(False) for _ in range(2 * L)]
    return projector, hidden, outer


def expected(projector: WeightedLinearProjector, hidden: list[Tensor], outer: list[nn.Linear] | None) -> list[Tensor]:
    """By the formulas, through the two maps one after the other where ``outer`` is given."""
    fc1, fc2 = projector.fc1, projector.fc2
    y = reference.layer_projection(hidden, fc1.weight, fc1.bias, fc2.weight, fc2.bias).unbind(0)
    return list(y) if outer is None else [linear(each) for linear, each in zip(outer, y, strict=True)]


def found(
    projector: WeightedLinearProjector, hidden: list[Tensor], outer: list[nn.Linear] | None, fold: bool = True
) -> list[Tensor]:
    if outer is None or not fold:
        return key_values.by_weights(projector, hidden, outer=outer or ())
    folded = _fold(projector.fc2, outer, hidden[0].dtype, ())
    return key_values.by_weights(projector, hidden, (folded.weight, folded.bias), outer)


@pytest.mark.parametrize("group", [1, 3, 99], ids=lambda n: f"{n}-slots-a-group")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("used", ["all", "some"])
def test_results_and_gradients_equal_the_whole_operations(
    used: str, bias: bool, form: str, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped_projection, "GROUP_BYTES", group * 2 * 5 * D_E * 8)
    projector, hidden, outer = parts(bias=bias)
    leaves = [*projector.parameters(), *hidden]
    right = expected(projector, hidden, None if form == "shared" else outer)
    mine = found(projector, hidden, None if form == "shared" else outer, form == "folded")
    for one, other in zip(mine, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    chosen = [0, 1, 2, 3] if used == "all" else [2]  # a slot that nobody used has no gradient
    weights = [torch.randn_like(y) for y in right]

    def gradients(results: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum((results[i] * weights[i]).sum() for i in chosen), leaves)

    for one, other in zip(gradients(mine), gradients(right), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_only_what_needs_a_gradient_gets_one() -> None:
    projector, hidden, _ = parts(hidden_grad=False)
    projector.fc1.requires_grad_(False)
    projector.fc2.bias.requires_grad_(False)
    sum(y.sum() for y in key_values.by_weights(projector, hidden)).backward()
    assert projector.fc2.weight.grad is not None
    assert projector.fc1.weight.grad is projector.fc1.bias.grad is projector.fc2.bias.grad is None
    assert all(layer.grad is None for layer in hidden)


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "in-two-steps"])
def test_nothing_of_x_or_y_is_kept(fold: bool) -> None:
    """Saved for the backward: the encoder's states and the parameters, no more."""
    projector, hidden, outer = parts(hidden_grad=False)
    frozen = [linear.weight for linear in outer]
    known = {t.data_ptr() for t in (*hidden, *projector.parameters(), *frozen)}
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        found(projector, hidden, outer, fold)
    assert saved and set(saved) <= known


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_keeps_to_the_error_of_plain_torch(dtype: torch.dtype, form: str) -> None:
    projector, hidden, outer = parts(torch.float64, hidden_grad=False)
    for module in (projector, *outer):
        module.to(dtype).double()  # numbers that dtype has
    hidden = [layer.to(dtype).double() for layer in hidden]
    grad = [torch.randn(2, 5, D_L if form == "shared" else D_KV, dtype=dtype) for _ in range(2 * L)]

    def gradients(results: list[Tensor]) -> list[Tensor]:
        loss = sum((y * g.to(y.dtype)).sum() for y, g in zip(results, grad, strict=True))
        return list(torch.autograd.grad(loss, list(projector.parameters())))

    maps = None if form == "shared" else outer
    right = gradients(expected(projector, hidden, maps))
    for module in (projector, *outer):
        module.to(dtype)
    hidden = [layer.to(dtype) for layer in hidden]
    plain = gradients(expected(projector, hidden, maps))
    mine = gradients(found(projector, hidden, maps, form == "folded"))
    for one, other, exact in zip(mine, plain, right, strict=True):
        allowed = 2 * (other.double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
        assert (one.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("reason", ["hooks", "torch asked for", "MLP", "patched"])
def test_where_modules_must_be_called_it_does_not_serve(reason: str) -> None:
    projector, hidden, _ = parts()
    assert key_values.useful(projector, hidden)
    if reason == "hooks":
        projector.register_forward_hook(lambda *_: None)
    elif reason == "torch asked for":
        projector.impl = "torch"
    elif reason == "MLP":
        projector.structure = "MLP"
    else:
        projector.fc2.forward = lambda x: x
    assert not key_values.useful(projector, hidden)


def test_the_model_trains_by_slots_as_by_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(fold_projections="never").double()
    inputs = batch(model=model)
    results = []
    for allowed in (True, False):
        if not allowed:
            monkeypatch.setattr(key_values, "useful", lambda *_: False)
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("llm", ["llama", "gemma2", "qwen2"])
def test_without_folding_the_maps_are_called_only_where_somebody_looks(llm: str) -> None:
    model = tiny_model(llm=llm, fold_projections="never")
    inputs = batch(model=model)
    called: list[str] = []
    linear = model.source_attentions[1].k_proj
    plain = type(linear).forward
    with pytest.MonkeyPatch.context() as patch:  # the class's: nobody is seen to look
        patch.setattr(nn.Linear, "forward", lambda self, x: (self is linear and called.append("k")) or plain(self, x))
        first = model(**inputs).loss
        assert len(called) == 1  # by the LLM itself, for its own positions
        handle = linear.register_forward_hook(lambda *_: called.append("hook"))
        second = model(**inputs).loss
        assert called[1:].count("k") == called[1:].count("hook") == 2
        handle.remove()
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
