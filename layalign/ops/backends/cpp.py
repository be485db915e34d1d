"""Backend "cpp": the C++ kernels of the compiled extension, for the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layalign.ops import extension
from layalign.ops.backends.base import Decode, KernelBackend
from layalign.utils.errors import BackendError

MIN_TRAINED = 2**18


class Cpp(KernelBackend):
    """The C++ kernels of ``layalign._C``."""

    devices = ("cpu",)
    decodes_in_place = True

    def usable(self, device_type: str) -> tuple[bool, str]:
        if device_type != "cpu":
            return False, f"the C++ kernels run on the CPU, the tensors are on {device_type}"
        try:
            return True, f"C++ kernels with {extension.module().instruction_set()} instructions"
        except BackendError as error:
            return False, str(error)

    def accepts_dtype(self, operation: str, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
        return extension.accepts_dtype(dtype)

    def pays(self, operation: str, *args: Any, **kwargs: Any) -> bool:
        return operation == "gated_cross_attention" or _mix_pays(*args)

    def cached_decode(self, inputs: Sequence[Tensor | None], scale: float | None, out: Tensor) -> Decode:
        described = *map(extension.describe, inputs), out.shape[-1] ** -0.5 if scale is None else float(scale)
        decode = extension.module().CachedDecode(described, extension.describe(out))

        def run(at_query: int, at_gate: int, at_residual: int, at_out: int) -> bool:
            decode(at_query, at_gate, at_residual, at_out, torch.get_num_threads())
            return True

        return run


def _mix_pays(hidden: Sequence[Tensor], weight: Tensor, *rest: object) -> bool:
    """True without gradients; with gradients where x has MIN_TRAINED numbers or more.

    Measured on two cores (docs/backends.md): below that, the overhead of two operations is more than the kernels save.
    """
    if torch.compiler.is_compiling():
        return True  # comparing the size would build one graph for each side of the threshold
    trained = torch.is_grad_enabled() and (weight.requires_grad or any(layer.requires_grad for layer in hidden))
    return not trained or hidden[0].numel() * weight.shape[0] >= MIN_TRAINED
