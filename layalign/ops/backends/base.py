"""The classes of backends: :class:`Backend` brings functions, :class:`KernelBackend` kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Implementation = Callable[..., torch.Tensor]
Decode = Callable[
    [int, int, int, int], bool
]  # addresses of query, gate, residual and result -> whether it was launched


class Backend:
    """Functions that serve operations of :mod:`layalign.ops`.

    Args:
        name: its name in ``impl=``.
        functions: by operation. Each takes the arguments of the public function without ``impl``, already checked, and
            brings its own gradient. Operations without a function are not served.

    Attributes:
        devices: the types of devices that it serves, beside those in ``on_request``.
        on_request: types of devices that it serves only where ``impl`` names it; ``impl="auto"`` skips it there.
    """

    devices: tuple[str, ...] = ("cpu", "cuda")
    on_request: tuple[str, ...] = ()

    def __init__(self, name: str, functions: Mapping[str, Implementation] | None = None) -> None:
        self.name, self.functions = name, dict(functions or {})

    def usable(self, device_type: str) -> tuple[bool, str]:
        """(usable, reason) on a type of device, for any operation. Asked once for each type."""
        if device_type not in self.devices:
            return False, f"{self.name} is for {' and '.join(self.devices)}, the tensors are on {device_type}"
        return True, "registered"

    def accepts(self, operation: str, *args: Any, **kwargs: Any) -> tuple[bool, str]:
        """(ok, reason) for the arguments of a call, where the backend is usable."""
        return True, ""

    def pays(self, operation: str, *args: Any, **kwargs: Any) -> bool:
        """Whether it is faster than plain torch for these arguments; asked under ``impl="auto"``."""
        return True


class KernelBackend(Backend):
    """Kernels only: the operations provide schema, fake, gradients and compilation.

    Args:
        name: its name in ``impl=``.
        launchers: functions that launch kernels, by name, with the signatures of those in ``layalign_kernels``:
            layer_mix_forward and layer_mix_backward, which also serve layer_projection with torch's product;
            layer_projection_forward, which fuses that product; gated_cross_attention_forward,
            gated_cross_attention_backward and gated_cross_attention_decode.

    Attributes:
        decodes_in_place: whether what :meth:`cached_decode` returns may write the result to the residual.
        reads_rows: whether its launchers of the layer mix take ``rows`` (N,), the positions of the tokens to compute in
            the flattened (B, S). Others get copies of these tokens.
    """

    decodes_in_place = False
    reads_rows = False

    def __init__(self, name: str, launchers: Mapping[str, Callable[..., Any]] | None = None) -> None:
        super().__init__(name)
        self.launchers = dict(launchers or {})

    def accepts_dtype(self, operation: str, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
        """(ok, reason) for the dtype in which a call computes."""
        return True, ""

    def cached_decode(self, inputs: Sequence[Tensor | None], scale: float | None, out: Tensor) -> Decode | None:
        """The decoding kernel for calls like this one, see :mod:`layalign.ops.cached_launch`.

        Args:
            inputs: query, key, value, gate, residual and mask, with last strides of one. The caller keeps key, value
                and mask alive.
            scale: of the scores, or None.
            out: memory like that for the results.

        Returns:
            A function of the addresses of query, gate, residual and result; None where only full calls can be made.
        """
        return None
