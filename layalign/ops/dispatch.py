"""Whether a call may go straight to its kernels.

A call through ``torch.library`` costs 15 to 20 microseconds in Python and the dispatcher, as much as the kernel of a
decoding step. The dispatcher provides gradients, tracing, modes and subclasses, none of which plain inference needs. So
the launcher is called directly where none of them is active. In any doubt the registered operation is called.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layalign.ops import checks


def can_skip_dispatcher(tensors: Sequence[Tensor | None] = (), *, differentiated: bool = False) -> bool:
    """Whether nothing would notice that a call's registered operation is skipped.

    False where :func:`layalign.ops.checks.can_read_memory` is, under the profiler, which shows the operation by its
    name, and where a gradient is needed.

    Args:
        tensors: all tensors of the call; None stands for an optional one that is absent.
        differentiated: the caller takes care of the gradient, so that a need for it does not matter.
    """
    if not checks.can_read_memory(tensors) or checks.profiling():
        return False
    if differentiated or not torch.is_grad_enabled():
        return True
    return not any(tensor is not None and tensor.requires_grad for tensor in tensors)
