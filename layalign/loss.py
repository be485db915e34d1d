"""The language-modelling loss, with logits only where a label stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layalign.packing import IGNORE_INDEX
from layalign.rows import put_around


@contextmanager
def passing_on(head: nn.Module, states: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Within the block, ``head`` does not run for ``states``, which are one call's own: it returns its input.

    Yields:
        The tensors it has returned so far.
    """
    returned: list[Tensor] = []

    def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not any(_is_view_of(args[0], each) for each in states):
            return forward(*args, **kwargs)
        returned.append(args[0])
        return args[0]

    with put_around(head, run):
        yield returned


def _is_view_of(tensor: Any, other: Tensor) -> bool:
    """Whether ``tensor`` is ``other`` in whole."""
    if not isinstance(tensor, Tensor) or tensor.shape != other.shape:
        return False
    return tensor is other or (tensor.data_ptr() == other.data_ptr() and tensor.stride() == other.stride())


def label_loss(logits: Tensor, targets: Tensor, divisor: Tensor | int | None) -> Tensor:
    """Cross-entropy in fp32 (fp64 for fp64) over labelled positions, divided by their number (or by ``divisor``)."""
    targets = targets.to(logits.device).flatten()
    wide = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(wide.flatten(0, -2), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return divided(total, targets, divisor)


def divided(total: Tensor, targets: Tensor, divisor: Tensor | int | None) -> Tensor:
    """A summed loss by the number of labels among ``targets``, or by ``divisor``."""
    if divisor is None:
        divisor = (targets != IGNORE_INDEX).sum().clamp(min=1)
    elif isinstance(divisor, Tensor):  # Trainer counts where its batches are, the LLM may end on another device
        divisor = divisor.to(total.device)
    return total / divisor


def with_loss(output: Any, loss: Tensor, logits: Tensor | None) -> Any:
    """The LLM's output object with another loss and other logits, its fields in transformers' order."""
    return type(output)(**{**output, "loss": loss, "logits": logits})
