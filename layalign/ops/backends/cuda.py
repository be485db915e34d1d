"""Backend "cuda": the CUDA kernels of the compiled extension.

Where ``LAYALIGN_EMULATE_CUDA`` names a module built by ``csrc/builder.py emulated``, they also serve CPU tensors, on
request only.
"""

from __future__ import annotations

import torch

from layalign.ops import extension
from layalign.ops.backends.base import KernelBackend
from layalign.utils.errors import BackendError

MIN_CAPABILITY = (8, 0)


class Cuda(KernelBackend):
    """The CUDA kernels of ``layalign._C``."""

    devices = ("cuda",)
    on_request = ("cpu",)

    def usable(self, device_type: str) -> tuple[bool, str]:
        emulated = device_type == "cpu" and extension.emulating()
        if device_type != "cuda" and not emulated:
            return False, f"cuda kernels need a GPU, the tensors are on {device_type}"
        try:
            found = extension.module(emulated)
        except BackendError as error:
            return False, str(error)
        if not found.cuda:
            note = extension.build_notes().get("cuda", "built without them")
            return False, f"the CUDA kernels are not there: {note}"
        if emulated:
            return True, "CUDA kernels emulated on the CPU (LAYALIGN_EMULATE_CUDA), on request only"
        if torch.version.hip is not None:
            return False, "the CUDA kernels do not run on AMD's GPUs"
        if not torch.cuda.is_available():
            return False, "torch sees no GPU here"
        has = torch.cuda.get_device_capability()
        if has < MIN_CAPABILITY:
            return False, f"the CUDA kernels need compute capability 8.0, this GPU has {has[0]}.{has[1]}"
        return True, extension.build_notes().get("cuda", "CUDA kernels found")

    def accepts_dtype(self, operation: str, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
        return extension.accepts_dtype(dtype)
