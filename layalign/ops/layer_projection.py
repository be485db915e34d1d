"""The layer mix and the linear map behind it, as one operation so that a backend may fuse them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from layalign import reference
from layalign.errors import ArgumentError
from layalign.ops import _checks, backends


def _torch(
    hidden: Sequence[Tensor], mix_weight: Tensor, mix_bias: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Tensor:
    dtype = hidden[0].dtype
    return reference.layer_projection(
        hidden,
        mix_weight.to(dtype),
        None if mix_bias is None else mix_bias.to(dtype),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
    )


backends.register("layer_projection", "torch", _torch)


def layer_projection(
    hidden: Sequence[Tensor],
    mix_weight: Tensor,
    mix_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """y[j] = layer_mix(hidden)[j] @ weight.T + bias.

    Args:
        hidden: E tensors (B, S, D_e) of one floating dtype and device.
        mix_weight: (2L, E); mix_bias: (2L,) or None.
        weight: (D_out, D_e), shared by all slots, or (2L, D_out, D_e), one per slot (the folded form).
        bias: (D_out,) or (2L, D_out), or None.
        impl: "auto" or a backend's name.

    Returns:
        (2L, B, S, D_out) in the dtype of ``hidden[0]``.

    Raises:
        ArgumentError: a shape, dtype or device does not fit.
        BackendError: the named backend cannot serve the call.

    Source: LayAlign, layer-wise aligner; structure "Linear" of the published code.
    """
    hidden = _checks.check_hidden(hidden)
    _checks.check_mix(hidden, mix_weight, mix_bias, "mix_")
    _check_projection(hidden[0], mix_weight.shape[0], weight, bias)
    device = hidden[0].device
    return backends.dispatch("layer_projection", impl, device, hidden, mix_weight, mix_bias, weight, bias)


def _check_projection(first: Tensor, slots: int, weight: Tensor, bias: Tensor | None) -> None:
    text = "(D_out, D_e) or (2L, D_out, D_e)"
    if not isinstance(weight, Tensor) or weight.dim() not in (2, 3) or not weight.is_floating_point():
        raise ArgumentError(f"weight: expected a floating tensor {text}, got {_checks.describe(weight)}")
    lead = () if weight.dim() == 2 else (slots,)
    outputs = weight.shape[-2]
    _checks.require_shape("weight", weight, (*lead, outputs, first.shape[-1]), text)
    _checks.require_same_device("weight", weight, "hidden[0]", first)
    if bias is None:
        return
    if not isinstance(bias, Tensor) or bias.dim() not in (1, 2) or not bias.is_floating_point():
        expected = "a floating tensor (D_out,) or (2L, D_out)"
        raise ArgumentError(f"bias: expected {expected}, got {_checks.describe(bias)}")
    _checks.require_shape("bias", bias, (outputs,) if bias.dim() == 1 else (slots, outputs), "(D_out,) or (2L, D_out)")
    _checks.require_same_device("bias", bias, "hidden[0]", first)
