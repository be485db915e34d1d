"""The weighted sum over encoder layers, all 2L mixes at once, with its relu."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from layalign import reference
from layalign.ops import _checks, backends


def _torch(hidden: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = hidden[0].dtype
    return reference.layer_mix(hidden, weight.to(dtype), None if bias is None else bias.to(dtype))


backends.register("layer_mix", "torch", _torch)


def layer_mix(hidden: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """x[j] = relu(sum_e weight[j, e] * hidden[e] + bias[j]).

    Args:
        hidden: E tensors (B, S, D_e) of one floating dtype and device.
        weight: (2L, E), any floating dtype.
        bias: (2L,) or None.
        impl: "auto" or a backend's name, see :mod:`layalign.ops.backends`.

    Returns:
        (2L, B, S, D_e) in the dtype of ``hidden[0]``. Slot 2i is the key of language layer i, slot 2i + 1 its value.

    Raises:
        ArgumentError: a shape, dtype or device does not fit.
        BackendError: the named backend cannot serve the call.

    Source: LayAlign, layer-wise aligner: the weighted sum before the projection.
    """
    hidden = _checks.check_hidden(hidden)
    _checks.check_mix(hidden, weight, bias)
    return backends.dispatch("layer_mix", impl, hidden[0].device, hidden, weight, bias)
