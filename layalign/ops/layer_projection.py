"""The layer mix and the linear map after it, as one operation so that a backend may fuse them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layalign import reference
from layalign.ops import backends, batched_linear, checks, dispatch, packed_weight
from layalign.ops.layer_mix import LAUNCHERS, computed, for_backend, in_dtype_of_hidden, options_of
from layalign.utils.errors import ArgumentError, BackendError

_FORWARD = "layalign::layer_projection"
_BACKWARD = "layalign::layer_projection_backward"
torch.library.define(
    _FORWARD,
    "(Tensor[] hidden, Tensor mix_weight, Tensor? mix_bias, Tensor weight, Tensor? bias, str plan, str backend, "
    "Tensor? rows=None) -> Tensor",
)
torch.library.define(
    _BACKWARD,
    "(Tensor grad, Tensor[] hidden, Tensor mix_weight, Tensor? mix_bias, Tensor weight, int bias_dims, bool need_mix, "
    "bool need_weight, bool need_hidden, str backend, Tensor? rows=None) -> Tensor[]",
)


PLANS = ("fused", "two_step")
FUSED_COLUMNS = 128  # output columns of one program of the fused kernel


def choose_plan(weight: Tensor) -> str:
    """Whether a backend with a fused kernel uses it for ``weight``, or its mix kernel and then torch's product.

    - Two steps write and read x, 2 * 2L * D_e elements per row, and multiply at the rate of torch's product.
    - The fused kernel saves that traffic and multiplies at its own rate. It repeats the mix for every FUSED_COLUMNS
      output columns. With one weight per slot it would read the E layers once per slot and block instead of x.

    So it is used where the slots share a weight and one block has all outputs. This is counted, not measured.
    """
    return "fused" if weight.dim() == 2 and weight.shape[0] <= FUSED_COLUMNS else "two_step"


def _run(
    hidden: Sequence[Tensor],
    mix_weight: Tensor,
    mix_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    plan: str,
    backend: str,
    rows: Tensor | None = None,
) -> Tensor:
    if rows is not None:
        checks.require_rows(rows, hidden[0])
    fused = backends.get(backend).launchers.get("layer_projection_forward")  # type: ignore[attr-defined]
    if plan == "auto":
        plan = choose_plan(weight)
    shared = weight.dim() == 2 and (bias is None or bias.dim() == 1)  # all that a fused kernel takes
    if plan == "fused" and fused is not None and shared:
        hidden = hidden if rows is None else checks.select_rows(hidden, rows)
        return fused(hidden, mix_weight, mix_bias, weight, bias)  # type: ignore[no-any-return]
    dtype = hidden[0].dtype
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if (
        backend == "cpp"
        and packed_weight.serves(hidden, weight.shape[-2])
        and packed_weight.pays(hidden, weight, len(mix_weight))
    ):
        y = hidden[0].new_empty((len(mix_weight), *hidden[0].shape[:2], weight.shape[-2]))
        packed_weight.project(hidden, mix_weight, mix_bias, weight, bias, y.unbind(0))
        return y
    x = backends.launcher(backend, "layer_mix_forward")(hidden, mix_weight, mix_bias, **options_of(rows))
    return _project(x, weight, bias)


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (2L, B, S, D_e) times one weight or one per slot, by torch's own products, which add the bias."""
    if weight.dim() == 2:
        shared = bias if bias is None or bias.dim() == 1 else None
        y = torch.nn.functional.linear(x, weight, shared)
        return y if shared is bias else y.add_(bias[:, None, None, :])  # type: ignore[index]  # not None: not shared
    rows = x.flatten(1, 2)
    if bias is None:
        y = torch.bmm(rows, weight.mT)
    else:
        y = torch.baddbmm(bias if bias.dim() == 1 else bias[:, None, :], rows, weight.mT)
    return y.view(*x.shape[:-1], weight.shape[1])


torch.library.impl(_FORWARD, "default", _run)


@torch.library.register_fake(_FORWARD)
def _(
    hidden: Sequence[Tensor], mix_weight: Tensor, mix_bias: Tensor | None, weight: Tensor, bias: Tensor | None,
    plan: str, backend: str, rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return hidden[0].new_empty((mix_weight.shape[0], *computed(hidden, rows)[:2], weight.shape[-2]))


@torch.library.impl(_BACKWARD, "default")
def _backward_op(
    grad: Tensor, hidden: Sequence[Tensor], mix_weight: Tensor, mix_bias: Tensor | None, weight: Tensor,
    bias_dims: int, need_mix: bool, need_weight: bool, need_hidden: bool, backend: str, rows: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """[d mix_weight, d mix_bias, d weight, d bias, d hidden]; an empty tensor stands for what is not needed.

    Gradients of biases are float32: a bias may have a wider dtype than its weight.
    """
    # x is computed again instead of being saved by the forward
    x = backends.launcher(backend, "layer_mix_forward")(hidden, mix_weight, mix_bias, **options_of(rows))
    grad = grad.to(x.dtype)
    empty = x.new_empty(0)
    found = [empty] * 5
    if need_weight:
        found[2] = _weight_gradient(grad, x, weight, backend).to(weight.dtype)
    if bias_dims:
        found[3] = grad.sum(dim=(0, 1, 2) if bias_dims == 1 else (1, 2), dtype=torch.float32)
    if need_mix or need_hidden:
        inner = _mix_gradient(grad, weight.to(x.dtype), backend)
        launch = backends.launcher(backend, "layer_mix_backward")
        parts = launch(inner, x, hidden, mix_weight, need_mix, need_hidden, **options_of(rows))
        if parts[0] is not None and parts[1] is not None:
            found[0], found[1] = parts[0].to(mix_weight.dtype), parts[1].float()
        if parts[2] is not None:
            found[4] = parts[2]
    return [part.clone() if part is empty else part for part in found]  # an op's outputs must not share memory


def _mix_gradient(grad: Tensor, weight: Tensor, backend: str) -> Tensor:
    """grad[j] @ weight[j], (2L, B, S, D_e), for one weight or one per slot."""
    if backend == "cpp" and grad.numel() and batched_linear.serves(grad, weight):
        shared = weight.dim() == 2
        grads, weights = ([grad], [weight]) if shared else (grad.unbind(0), weight.unbind(0))
        found = grad.new_empty((len(grads), grad[..., 0].numel() // len(grads), weight.shape[-1]))
        return batched_linear.backward(grads, weights, found).view(*grad.shape[:-1], weight.shape[-1])
    if weight.dim() == 2:
        return grad @ weight
    return torch.bmm(grad.flatten(1, 2), weight).view(*grad.shape[:-1], weight.shape[-1])


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, backend: str) -> Tensor:
    """grad[j].T @ x[j] in the layout of ``weight``, or their sum where the slots share one weight.

    In half precision that sum is one product: adding slot by slot would round after each.
    """
    pair = grad.flatten(1, 2), x.flatten(1, 2)
    if backend == "cpp" and weight.dim() == 2 and x.dtype == torch.float32:
        total = x.new_zeros((x.shape[-1], weight.shape[0]))
        packed_weight.add_weight_gradient(total, pair[0].unbind(0), pair[1])
        return total.T.contiguous()
    if weight.dim() == 3:
        return torch.bmm(pair[0].mT, pair[1])
    return pair[0].flatten(0, 1).mT @ pair[1].flatten(0, 1)


@torch.library.register_fake(_BACKWARD)
def _(
    grad: Tensor, hidden: Sequence[Tensor], mix_weight: Tensor, mix_bias: Tensor | None, weight: Tensor,
    bias_dims: int, need_mix: bool, need_weight: bool, need_hidden: bool, backend: str, rows: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    first, slots = hidden[0], mix_weight.shape[0]
    bias_shape: tuple[int, ...] = ((0,), (weight.shape[-2],), (slots, weight.shape[-2]))[bias_dims]
    return [
        torch.empty_like(mix_weight) if need_mix else first.new_empty(0),
        mix_weight.new_empty(slots, dtype=torch.float32) if need_mix else first.new_empty(0),
        torch.empty_like(weight) if need_weight else first.new_empty(0),
        weight.new_empty(bias_shape, dtype=torch.float32) if bias_dims else first.new_empty(0),
        first.new_empty((len(hidden), *first.shape) if need_hidden else 0),
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, mix_weight, mix_bias, weight, bias, _, ctx.backend, rows = inputs
    ctx.bias_dims, ctx.bias_dtype = (0, None) if bias is None else (bias.dim(), bias.dtype)
    ctx.save_for_backward(mix_weight, weight, mix_bias, rows, *hidden)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    mix_weight, weight, mix_bias, rows, *hidden = ctx.saved_tensors
    layers, need_mix, need_mix_bias, need_weight, need_bias, *_ = ctx.needs_input_grad
    need_hidden = any(layers)
    found = torch.ops.layalign.layer_projection_backward(
        grad,
        hidden,
        mix_weight,
        mix_bias,
        weight,
        ctx.bias_dims if need_bias else 0,
        need_mix or need_mix_bias,
        need_weight,
        need_hidden,
        ctx.backend,
        rows,
    )
    return (
        list(found[4].unbind(0)) if need_hidden else [None] * len(hidden),
        found[0] if need_mix else None,
        found[1].to(mix_bias.dtype) if mix_bias is not None and need_mix_bias else None,
        found[2] if need_weight else None,
        found[3].to(ctx.bias_dtype) if need_bias else None,
        *[None] * (len(ctx.needs_input_grad) - 5),  # torch leaves out arguments that have their default
    )


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise BackendError("layer_projection: the kernels have no second derivative; use impl='torch'")


torch.library.register_autograd(_FORWARD, _backward, setup_context=_save)
torch.library.register_autograd(_BACKWARD, _no_second_derivative)


def _fused(backend: str) -> backends.Implementation:
    def run(
        hidden: Sequence[Tensor], mix_weight: Tensor, mix_bias: Tensor | None, weight: Tensor, bias: Tensor | None, *,
        rows: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        hidden = checks.autocast(hidden)
        inputs = hidden, mix_weight, mix_bias, weight, bias
        direct = dispatch.can_skip_dispatcher((*hidden, *inputs[1:], rows))
        return (_run if direct else torch.ops.layalign.layer_projection)(*inputs, "auto", backend, rows)  # type: ignore[no-any-return]

    return run


_plain = in_dtype_of_hidden(reference.layer_projection)
backends.define("layer_projection", backends.Operation(_plain, _fused, LAUNCHERS, checks.mix_limits))


def layer_projection(
    hidden: Sequence[Tensor],
    mix_weight: Tensor,
    mix_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """y[j] = layer_mix(hidden)[j] @ weight.T + bias.

    Args:
        hidden: E tensors (B, S, D_e) of one floating dtype and device.
        mix_weight: (2L, E); mix_bias: (2L,) or None.
        weight: (D_out, D_e), shared by all slots, or (2L, D_out, D_e), one per slot (the folded form).
        bias: (D_out,) or (2L, D_out), or None.
        rows: (N,) int64, the tokens to compute, as for :func:`layalign.ops.layer_mix`; the result is (2L, 1, N, D_out).
        impl: "auto" or a backend's name. How Triton computes it: :func:`choose_plan`.

    Returns:
        (2L, B, S, D_out) in the dtype of ``hidden[0]`` (under autocast, the autocast dtype).

    Raises:
        ArgumentError: a shape, dtype or device does not fit.
        BackendError: the named backend cannot serve the call.

    Source: LayAlign, layer-wise aligner; structure "Linear" of the published code.
    """
    hidden = checks.check_hidden(hidden)
    checks.check_mix(hidden, mix_weight, mix_bias, "mix_")
    _check_projection(hidden[0], mix_weight.shape[0], weight, bias)
    rest, device = (mix_weight, mix_bias, weight, bias), hidden[0].device
    hidden, more = for_backend("layer_projection", impl, hidden, rest, rows)
    return backends.dispatch("layer_projection", impl, device, hidden, *rest, **more)


def _check_projection(first: Tensor, slots: int, weight: Tensor, bias: Tensor | None) -> None:
    text = "(D_out, D_e) or (2L, D_out, D_e)"
    if not checks.is_floating(weight) or weight.dim() not in (2, 3):
        raise ArgumentError(f"weight: expected a floating tensor {text}, got {checks.describe(weight)}")
    lead = () if weight.dim() == 2 else (slots,)
    outputs = weight.shape[-2]
    checks.require_shape("weight", weight, (*lead, outputs, first.shape[-1]), text)
    checks.require_same_device("weight", weight, "hidden[0]", first)
    checks.require_addressable("weight", slots, *first.shape[:2], outputs)
    if bias is None:
        return
    if not checks.is_floating(bias) or bias.dim() not in (1, 2):
        expected = "a floating tensor (D_out,) or (2L, D_out)"
        raise ArgumentError(f"bias: expected {expected}, got {checks.describe(bias)}")
    checks.require_shape("bias", bias, (outputs,) if bias.dim() == 1 else (slots, outputs), "(D_out,) or (2L, D_out)")
    checks.require_same_device("bias", bias, "hidden[0]", first)
