"""Backend "triton": GPU kernels in ``layalign_kernels``; on a CPU under ``TRITON_INTERPRET=1``, on request only."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from layalign.ops import checks
from layalign.ops.backends.base import Decode, KernelBackend

FILES = {
    "layer_mix_forward": "layer_mix",
    "layer_mix_backward": "layer_mix",
    "layer_projection_forward": "layer_projection",
    "gated_cross_attention_forward": "gated_cross_attention",
    "gated_cross_attention_backward": "gated_cross_attention_backward",
    "gated_cross_attention_decode": "gated_cross_attention_decode",
}


def interpreting() -> bool:
    """Whether Triton runs its kernels on CPU tensors, in Python (for debugging and tests)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


class Triton(KernelBackend):
    """The Triton kernels of ``layalign_kernels``."""

    devices = ("cuda",)
    on_request = ("cpu",)  # thousands of times slower than torch
    reads_rows = True

    def usable(self, device_type: str) -> tuple[bool, str]:
        if importlib.util.find_spec("layalign_kernels") is None:
            return False, "layalign_kernels is not part of this installation"
        if importlib.util.find_spec("triton") is None:
            return False, "the package triton is not installed"
        if device_type == "cpu" and interpreting():
            return True, "Triton's interpreter (TRITON_INTERPRET=1), on request only"
        if device_type != "cuda":
            return False, f"triton kernels need a GPU, the tensors are on {device_type}"
        return True, "layalign_kernels found"

    def accepts_dtype(self, operation: str, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
        if dtype == torch.float64:
            return False, "float64 is left to impl='torch', its kernels compute in float32"
        exact = dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
        # Triton 3.7 turns tiles of 64 rows and more into TF32 there; the attention's tiles have fewer rows.
        if exact and operation != "gated_cross_attention" and checks.is_sm_100(device):
            return False, "on this chip Triton 3.7 would compute float32 products in TF32"
        if dtype == torch.bfloat16 and device.type == "cpu":
            return False, "Triton's interpreter computes bfloat16 products wrongly"
        return True, ""

    def cached_decode(self, inputs: Sequence[Tensor | None], scale: float | None, out: Tensor) -> Decode | None:
        if interpreting():
            return None
        found = importlib.import_module("layalign_kernels.cached_launch")
        return found.cached_decode(inputs, scale, out)  # type: ignore[no-any-return]


def launchers() -> dict[str, Callable[..., Any]]:
    """The functions of :data:`FILES`, by name; the first call of one imports its file."""
    return {function: functools.partial(_launch, function) for function in FILES}


def _launch(function: str, *arguments: Any, **options: Any) -> Any:
    return _launcher(function)(*arguments, **options)


@functools.cache  # a launch does not look for its module again
def _launcher(function: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"layalign_kernels.{FILES[function]}"), function)  # type: ignore[no-any-return]
