"""Cross-attention to the source, scaled by a learned gate and added to the self-attention's output.

All backends with kernels share three ``torch.library`` operations:

- ``layalign::gated_cross_attention`` -> (out, log-sum-exp), differentiable once;
- ``layalign::gated_cross_attention_backward``, its gradients;
- ``layalign::gated_cross_attention_decode`` -> out, for at most 16 rows (T) without gradients. It packs the heads of a
  group into one tile and splits the source over the device.

Query, key and value are cast to one dtype first: autocast's where autocast is on, else the query's. The gate and the
residual keep theirs. float64 is left to plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layalign import reference
from layalign.ops import backends, checks, dispatch
from layalign.utils.errors import ArgumentError, BackendError, shown

MAX_HEAD_SIZE = 256
MAX_DECODE_ROWS = 16
MAX_SCALE = torch.finfo(torch.float32).max  # the kernels multiply in float32
_FORWARD = "layalign::gated_cross_attention"
_BACKWARD = "layalign::gated_cross_attention_backward"
_DECODE = "layalign::gated_cross_attention_decode"
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor gate, Tensor? residual, Tensor? key_mask, float? scale, str backend"
)

torch.library.define(_FORWARD, f"({_ARGUMENTS}) -> (Tensor, Tensor)")
torch.library.define(_DECODE, f"({_ARGUMENTS}) -> Tensor")
torch.library.define(
    _BACKWARD,
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor gate, Tensor? key_mask, Tensor lse, float? scale, "
    "bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)


_forward = backends.launched("gated_cross_attention_forward")
torch.library.impl(_FORWARD, "default", _forward)
torch.library.impl(_DECODE, "default", backends.launched("gated_cross_attention_decode"))
_launch_backward = backends.launched("gated_cross_attention_backward")


@torch.library.register_fake(_FORWARD)
def _forward_fake(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, length, size = query.shape
    out = query.new_empty((batch, length, heads, size))
    return out, query.new_empty((batch, heads, length), dtype=torch.float32)


@torch.library.register_fake(_DECODE)
def _decode_fake(query: Tensor, *rest: Any) -> Tensor:
    batch, heads, length, size = query.shape
    return query.new_empty((batch, length, heads, size))


def _backward(grad: Tensor, query: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """(dq, dk, dv, dgate); an empty tensor stands for what is not needed."""
    found = _launch_backward(grad, query, *others)
    return tuple(query.new_empty(0) if gradient is None else gradient for gradient in found)


torch.library.impl(_BACKWARD, "default", _backward)


@torch.library.register_fake(_BACKWARD)
def _backward_fake(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, gate: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    def like(states: Tensor) -> Tensor:  # a view of (B, rows, heads, d) memory
        batch, heads, rows, size = states.shape
        return states.new_empty((batch, rows, heads, size)).transpose(1, 2)

    needs = rest[-2]
    states = zip((query, key, value), needs[:3], strict=True)
    gradients = [like(tensor) if need else query.new_empty(0) for tensor, need in states]
    return (*gradients, gate.new_empty(gate.shape) if needs[3] else query.new_empty(0))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, gate, residual, key_mask, scale, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, gate, key_mask, output[1])
    ctx.scale = scale
    ctx.residual_dtype = None if residual is None else residual.dtype


def _autograd(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    *needs, need_residual = ctx.needs_input_grad[:5]
    each: list[Tensor | None] = [None] * 4
    if any(needs):
        query, key, value, gate, key_mask, lse = ctx.saved_tensors
        # The operation where gradients of gradients are needed: it refuses the second derivative.
        direct = dispatch.can_skip_dispatcher((grad, query, key, value, gate, key_mask, lse))
        found = (_backward if direct else torch.ops.layalign.gated_cross_attention_backward)(
            grad, query, key, value, gate, key_mask, lse, ctx.scale, needs, ctx.backend
        )
        each = [gradient if need else None for gradient, need in zip(found, needs, strict=True)]
    return (*each, grad.to(ctx.residual_dtype) if need_residual else None, None, None, None)


class _Eager(torch.autograd.Function):
    """The first operation and its gradients without ``torch.library``, which costs 0.2 ms per layer and step."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_autograd)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise BackendError("gated_cross_attention: the kernels have no second derivative; use impl='torch'")


def _no_derivative(ctx: Any, *grads: Tensor) -> None:
    raise BackendError("gated_cross_attention_decode: has no derivative; use gated_cross_attention")


torch.library.register_autograd(_FORWARD, _autograd, setup_context=_setup_context)
torch.library.register_autograd(_BACKWARD, _no_second_derivative)
torch.library.register_autograd(_DECODE, _no_derivative)


def _fused(backend: str) -> backends.Implementation:
    def run(
        query: Tensor, key: Tensor, value: Tensor, gate: Tensor, residual: Tensor | None, *,
        key_mask: Tensor | None, scale: float | None,
    ) -> Tensor:  # fmt: skip
        dtype = checks.compute_dtype(query)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        inputs = query, key, value, gate, residual, key_mask
        if dispatch.can_skip_dispatcher(inputs):
            few = query.shape[2] <= MAX_DECODE_ROWS
            launch = backends.launcher(
                backend, "gated_cross_attention_decode" if few else "gated_cross_attention_forward"
            )
            found = launch(*inputs, scale)
            return found if few else found[0]  # type: ignore[no-any-return]
        training = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
        if training and dispatch.can_skip_dispatcher(inputs, differentiated=True):
            return _Eager.apply(*inputs, scale, backend)[0]  # type: ignore[no-any-return]
        # `training` first: reading a length makes a graph guard it.
        if not training and query.shape[2] <= MAX_DECODE_ROWS:
            return torch.ops.layalign.gated_cross_attention_decode(*inputs, scale, backend)  # type: ignore[no-any-return]
        return torch.ops.layalign.gated_cross_attention(*inputs, scale, backend)[0]  # type: ignore[no-any-return]

    return run


def _limits(query: Tensor, key: Tensor, *rest: Any, **options: Any) -> tuple[bool, str]:
    # One by one: max() over dynamic sizes of an exported graph would tie them to one another.
    if any(size > checks.MAX_SIZE for size in (*query.shape, key.shape[2])):
        return False, f"its kernels go up to sizes of {checks.MAX_SIZE}"
    if query.shape[-1] > MAX_HEAD_SIZE:
        return False, f"its kernels go up to head size {MAX_HEAD_SIZE}, this is {query.shape[-1]}"
    return True, ""


LAUNCHERS = "gated_cross_attention_forward", "gated_cross_attention_backward", "gated_cross_attention_decode"
backends.define(
    "gated_cross_attention", backends.Operation(reference.gated_cross_attention, _fused, LAUNCHERS, _limits)
)


def gated_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    residual: Tensor | None = None,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """residual + gate * softmax(query @ key.T * scale + mask) @ value.

    Args:
        query: (B, H, T, d), floating.
        key, value: (B, G, S, d), floating, H a multiple of G.
        gate: a tensor with one number, on the device.
        residual: (B, T, H, d) or None.
        key_mask: (B, S) bool, true where attended, or None. A row that is all false contributes zero.
        scale: factor on the scores, 1 / sqrt(d) by default.
        impl: "auto" or a backend's name.

    Returns:
        (B, T, H, d) in the dtype of ``query``, as transformers' attention functions return it.

    Raises:
        ArgumentError: a shape, dtype or device does not fit.
        BackendError: the named backend cannot serve the call.

    Source: LayAlign, adaptive fusion-enhanced attention.
    """
    _check(query, key, value, gate, residual, key_mask)
    _check_scale(scale)
    if gate.dim() > 1:
        gate = gate.reshape(1)
    return backends.dispatch(
        "gated_cross_attention",
        impl,
        query.device,
        query,
        key,
        value,
        gate,
        residual,
        key_mask=key_mask,
        scale=scale,
    )


def _check(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor, residual: Tensor | None, key_mask: Tensor | None
) -> None:
    checks.require_tensor("query", query, 4, "(B, H, T, d)")
    checks.require_tensor("key", key, 4, "(B, G, S, d)")
    checks.require_tensor("value", value, 4, "(B, G, S, d)")
    batch, heads, length, size = query.shape
    groups, source = key.shape[1], key.shape[2]
    if size == 0:
        raise ArgumentError(f"query: expected a head size d of 1 and more, got {checks.describe(query)}")
    if groups == 0 or heads % groups:
        raise ArgumentError(f"key: expected a number of heads G that divides H = {heads}, got G = {groups}")
    checks.require_shape("key", key, (batch, groups, source, size), "(B, G, S, d)")
    checks.require_shape("value", value, (batch, groups, source, size), "(B, G, S, d)")
    checks.require_addressable("query, key", batch, heads, length, source + size)
    checks.require_same_device("key", key, "query", query)
    checks.require_same_device("value", value, "query", query)
    if not checks.is_floating(gate) or gate.numel() != 1:
        raise ArgumentError(f"gate: expected a floating tensor with one number, got {checks.describe(gate)}")
    checks.require_same_device("gate", gate, "query", query)
    if residual is not None:
        checks.require_tensor("residual", residual, 4, "(B, T, H, d)")
        checks.require_shape("residual", residual, (batch, length, heads, size), "(B, T, H, d)")
        checks.require_same_device("residual", residual, "query", query)
    if key_mask is not None:
        if not checks.is_plain(key_mask) or key_mask.dtype != torch.bool:
            raise ArgumentError(f"key_mask: expected a bool tensor (B, S), got {checks.describe(key_mask)}")
        checks.require_shape("key_mask", key_mask, (batch, source), "(B, S)")
        checks.require_same_device("key_mask", key_mask, "query", query)


def _check_scale(scale: float | None) -> None:
    if torch.compiler.is_compiling() or scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not -MAX_SCALE <= scale <= MAX_SCALE:
        raise ArgumentError(f"scale: expected a finite float32 number or None, got {shown(scale)}")
