"""What a backend is: :class:`Backend`, and :class:`KernelBackend` for one that brings kernels alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch

Implementation = Callable[..., torch.Tensor]


class Backend:
    """Functions that serve operations of :mod:`layalign.ops`.

    Args:
        name: what ``impl=`` calls it.
        functions: by operation, with the arguments of its public function, checked; ``impl`` apart. They are
            differentiable by themselves. An operation that is not here is not served.

    Attributes:
        devices: types of devices it is for.
        on_request: of those, where ``impl="auto"`` passes it by.
    """

    devices: tuple[str, ...] = ("cpu", "cuda")
    on_request: tuple[str, ...] = ()

    def __init__(self, name: str, functions: Mapping[str, Implementation] | None = None) -> None:
        self.name, self.functions = name, dict(functions or {})

    def usable(self, device_type: str) -> tuple[bool, str]:
        """(usable, reason), whatever the operation. Asked once for each type of device."""
        if device_type not in self.devices:
            return False, f"{self.name} is for {' and '.join(self.devices)}, the tensors are on {device_type}"
        return True, "registered"

    def accepts(self, operation: str, *args: Any, **kwargs: Any) -> tuple[bool, str]:
        """(ok, reason) for the arguments of a call, once it is usable."""
        return True, ""

    def pays(self, operation: str, *args: Any, **kwargs: Any) -> bool:
        """Under ``impl="auto"``, whether it is faster than plain torch for these arguments."""
        return True


class KernelBackend(Backend):
    """Kernels behind the launchers' names; schema, fake, gradients and compilation are the operations' own.

    Args:
        name: what ``impl=`` calls it.
        launchers: by name, with the signatures of those in ``layalign_kernels``: layer_mix_forward and
            layer_mix_backward (they serve layer_projection too, with torch's product; layer_projection_forward fuses
            it); gated_cross_attention_forward, gated_cross_attention_backward and gated_decode.
    """

    def __init__(self, name: str, launchers: Mapping[str, Callable[..., Any]] | None = None) -> None:
        super().__init__(name)
        self.launchers = dict(launchers or {})

    def launcher(self, function: str) -> Callable[..., Any] | None:
        """What launches the kernel of a name, if there is one."""
        return self.launchers.get(function)

    def accepts_dtype(self, operation: str, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
        """(ok, reason) for the dtype that a call computes in."""
        return True, ""

    def cached_launches(self) -> ModuleType | None:
        """Where calls that come again hand over addresses alone, see :mod:`layalign.ops.cached_launch`."""
        return None
