"""The weighted sum over encoder layers, all 2L mixes at once, with its relu."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from layalign import reference
from layalign.ops import backends, checks, dispatch
from layalign.utils.errors import BackendError


def in_dtype_of_hidden(function: Callable[..., Tensor]) -> backends.Implementation:
    """``function`` of the layers and of weights and biases, all in the layers' dtype, or in autocast's."""

    def run(hidden: Sequence[Tensor], *parameters: Tensor | None) -> Tensor:
        hidden = checks.autocast(hidden)
        return function(hidden, *(None if each is None else each.to(hidden[0].dtype) for each in parameters))

    return run


_FORWARD = "layalign::layer_mix"
_BACKWARD = "layalign::layer_mix_backward"
# Not torch.library.custom_op: its checks of every call cost as much as a small mix.
torch.library.define(
    _FORWARD, "(Tensor[] hidden, Tensor weight, Tensor? bias, str backend, Tensor? rows=None) -> Tensor"
)
torch.library.define(
    _BACKWARD,
    "(Tensor grad, Tensor x, Tensor[] hidden, Tensor weight, bool need_weight, bool need_hidden, str backend, "
    "Tensor? rows=None) -> (Tensor, Tensor, Tensor)",
)


def options_of(rows: Tensor | None) -> dict[str, Tensor]:
    """The keyword arguments of a launcher: only some backends know ``rows``."""
    return {} if rows is None else {"rows": rows}


def computed(hidden: Sequence[Tensor], rows: Tensor | None) -> tuple[int, ...]:
    """The shape of a layer's tokens that are computed."""
    return tuple(hidden[0].shape) if rows is None else (1, len(rows), hidden[0].shape[2])


def _forward_op(
    hidden: Sequence[Tensor], weight: Tensor, bias: Tensor | None, backend: str, rows: Tensor | None = None
) -> Tensor:
    if rows is not None:
        checks.require_rows(rows, hidden[0])
    return backends.launcher(backend, "layer_mix_forward")(hidden, weight, bias, **options_of(rows))  # type: ignore[no-any-return]


torch.library.impl(_FORWARD, "default", _forward_op)


@torch.library.register_fake(_FORWARD)
def _(
    hidden: Sequence[Tensor], weight: Tensor, bias: Tensor | None, backend: str, rows: Tensor | None = None
) -> Tensor:
    return hidden[0].new_empty((weight.shape[0], *computed(hidden, rows)))


@torch.library.impl(_BACKWARD, "default")
def _backward_op(
    grad: Tensor, x: Tensor, hidden: Sequence[Tensor], weight: Tensor, need_weight: bool, need_hidden: bool,
    backend: str, rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dW, db, dh); an empty tensor stands for what is not needed."""
    launch = backends.launcher(backend, "layer_mix_backward")
    found = launch(grad, x, hidden, weight, need_weight, need_hidden, **options_of(rows))
    # The bias may have a wider dtype than the weight: its gradient stays in float32 until the bias's dtype is known.
    dtypes = (weight.dtype, torch.float32, x.dtype)
    return tuple(  # type: ignore[return-value]
        x.new_empty(0, dtype=dtype) if part is None else part.to(dtype)
        for part, dtype in zip(found, dtypes, strict=True)
    )


@torch.library.register_fake(_BACKWARD)
def _(
    grad: Tensor, x: Tensor, hidden: Sequence[Tensor], weight: Tensor, need_weight: bool, need_hidden: bool,
    backend: str, rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    weight_grad = torch.empty_like(weight) if need_weight else weight.new_empty(0)
    bias_grad = weight.new_empty(weight.shape[0] if need_weight else 0, dtype=torch.float32)
    return weight_grad, bias_grad, x.new_empty((len(hidden), *hidden[0].shape) if need_hidden else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, weight, bias, ctx.backend, rows = inputs
    ctx.save_for_backward(rows, output, weight, *hidden)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rows, x, weight, *hidden = ctx.saved_tensors
    layers, need_weight, need_bias, *_ = ctx.needs_input_grad
    need_hidden = any(layers)
    weight_grad, bias_grad, hidden_grad = torch.ops.layalign.layer_mix_backward(
        grad, x, hidden, weight, need_weight or need_bias, need_hidden, ctx.backend, rows
    )
    per_layer = list(hidden_grad.unbind(0)) if need_hidden else [None] * len(hidden)
    bias_grad = bias_grad.to(ctx.bias_dtype) if need_bias else None
    rest = [None] * (len(ctx.needs_input_grad) - 3)  # torch leaves out arguments that have their default
    return per_layer, weight_grad if need_weight else None, bias_grad, *rest


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise BackendError("layer_mix: the kernels have no second derivative; use impl='torch'")


torch.library.register_autograd(_FORWARD, _backward, setup_context=_save)
torch.library.register_autograd(_BACKWARD, _no_second_derivative)


def _fused(backend: str) -> backends.Implementation:
    def run(hidden: Sequence[Tensor], weight: Tensor, bias: Tensor | None, *, rows: Tensor | None = None) -> Tensor:
        hidden = checks.autocast(hidden)
        direct = dispatch.can_skip_dispatcher((*hidden, weight, bias, rows))
        launch = _forward_op if direct else torch.ops.layalign.layer_mix
        return launch(hidden, weight, bias, backend, rows)  # type: ignore[no-any-return]

    return run


LAUNCHERS = "layer_mix_forward", "layer_mix_backward"
backends.define(
    "layer_mix", backends.Operation(in_dtype_of_hidden(reference.layer_mix), _fused, LAUNCHERS, checks.mix_limits)
)


def for_backend(
    operation: str, impl: str, hidden: Sequence[Tensor], rest: Sequence[Tensor | None], rows: Tensor | None
) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
    """(hidden, further arguments): where the backend does not read ``rows``, copies of these tokens instead."""
    if rows is None:
        return hidden, {}
    checks.check_rows(rows, hidden[0])
    if backends.reads_rows(operation, impl, hidden[0].device.type, hidden, *rest):
        return hidden, {"rows": rows}  # which the operation checks, where a graph is compiled too
    if not torch.compiler.is_compiling():
        checks.require_rows(rows, hidden[0])
    return checks.select_rows(hidden, rows), {}


def layer_mix(
    hidden: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """x[j] = relu(sum_e weight[j, e] * hidden[e] + bias[j]).

    Args:
        hidden: E tensors (B, S, D_e) of one floating dtype and device.
        weight: (2L, E), any floating dtype.
        bias: (2L,) or None.
        rows: (N,) int64, the tokens to compute: ascending positions in the flattened (B, S). The result
            is (2L, 1, N, D_e) then. None for all tokens.
        impl: "auto" or a backend's name, see :mod:`layalign.ops.backends`.

    Returns:
        (2L, B, S, D_e) in the dtype of ``hidden[0]``. Slot 2i is the key of language layer i, slot 2i + 1 its value.
        Under autocast, as for torch's own products, in the autocast dtype.

    Raises:
        ArgumentError: a shape, dtype or device does not fit; rows that are not these (on a GPU, a device-side assert).
        BackendError: the named backend cannot serve the call.

    Source: LayAlign, layer-wise aligner: the weighted sum before the projection.
    """
    hidden = checks.check_hidden(hidden)
    checks.check_mix(hidden, weight, bias)
    hidden, more = for_backend("layer_mix", impl, hidden, (weight, bias), rows)
    return backends.dispatch("layer_mix", impl, hidden[0].device, hidden, weight, bias, **more)
