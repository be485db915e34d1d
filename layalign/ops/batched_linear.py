"""Many linear maps, each applied to its own rows, in one call: forward and gradient of the rows.

With few rows torch's product, one map at a time, spends most of its time packing the weight, and on some CPUs its
library uses half of the arithmetic. The C++ kernel (csrc/cpu/batched_linear.cpp) computes all maps in one call. It
serves float32 on a CPU; torch multiplies the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from layalign.ops import checks, extension, packed_weight


def serves(*tensors: Tensor | None) -> bool:
    """Whether the kernel takes these tensors."""
    if not packed_weight.available() or not checks.can_read_memory(tensors):
        return False
    return all(t is None or (t.device.type == "cpu" and t.dtype == torch.float32) for t in tensors)


def forward(
    x: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None], kernel: bool = True
) -> list[Tensor]:
    """x[j] (..., K) @ weights[j].T + biases[j], with weights (N, K) and biases (N,) or None.

    Args:
        kernel: whether the C++ kernel may be used.
    """
    if not kernel or not serves(*x, *weights, *biases):
        return [F.linear(each, weight, bias) for each, weight, bias in zip(x, weights, biases, strict=True)]
    found = [each.new_empty((*each.shape[:-1], weight.shape[0])) for each, weight in zip(x, weights, strict=True)]
    rows, outs = ([tensor.flatten(0, -2) for tensor in tensors] for tensors in (x, found))
    extension.batched_linear(rows, weights, biases, outs, transposed=True)
    return found


def backward(grads: Sequence[Tensor | None], weights: Sequence[Tensor], found: Tensor, kernel: bool = True) -> Tensor:
    """The rows' gradients: found[j] = grads[j] (..., N) @ weights[j] with weights (N, K), zeros for None.

    Args:
        found: (J, R, K) contiguous, written.
        kernel: whether the C++ kernel may be used.

    Returns:
        ``found``.
    """
    there = []
    for place, grad in enumerate(grads):
        if grad is None:
            found[place].zero_()
        else:
            there.append((grad.flatten(0, -2), weights[place], found[place]))
    if not there:
        return found
    rows, maps, outs = (list(column) for column in zip(*there, strict=True))
    if kernel and serves(*rows, *maps, found):
        extension.batched_linear(rows, maps, [None] * len(rows), outs, transposed=False)
    else:
        for grad, weight, out in there:
            torch.mm(grad, weight, out=out)
    return found
