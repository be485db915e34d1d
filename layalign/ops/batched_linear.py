"""Products of the slots' states with the maps that belong to them, many slots in one call.

With few rows torch's own product, one slot at a time, spends long on arranging each weight, and on a CPU that its
library was not written for it leaves half of the arithmetic unused. The C++ kernel (csrc/cpu/batched_linear.cpp) goes
through all slots at once. It is taken for float32 on a CPU; what it cannot take is multiplied by torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from layalign.ops import dispatch, extension, packed_weight


def serves(*tensors: Tensor | None) -> bool:
    """Whether the kernel takes these tensors."""
    if not packed_weight.available() or not dispatch.plain(tensors):
        return False
    return all(t is None or (t.device.type == "cpu" and t.dtype == torch.float32) for t in tensors)


def by_maps(
    x: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None], kernel: bool = True
) -> list[Tensor]:
    """x[j] (..., K) @ weights[j].T + biases[j], with weights (N, K) and biases (N,) or None.

    Args:
        kernel: whether the C++ kernel may be taken.
    """
    if not kernel or not serves(*x, *weights, *biases):
        return [F.linear(each, weight, bias) for each, weight, bias in zip(x, weights, biases, strict=True)]
    found = [each.new_empty((*each.shape[:-1], weight.shape[0])) for each, weight in zip(x, weights, strict=True)]
    rows, outs = ([tensor.flatten(0, -2) for tensor in tensors] for tensors in (x, found))
    extension.slot_products(rows, weights, biases, outs, turned=True)
    return found


def back_by_maps(
    grads: Sequence[Tensor | None], weights: Sequence[Tensor], found: Tensor, kernel: bool = True
) -> Tensor:
    """found[j] = grads[j] (..., N) @ weights[j] with weights (N, K), zeros for None.

    Args:
        found: (J, R, K) contiguous, written.
        kernel: whether the C++ kernel may be taken.

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
        extension.slot_products(rows, maps, [None] * len(rows), outs, turned=False)
    else:
        for grad, weight, out in there:
            torch.mm(grad, weight, out=out)
    return found
