"""The language-modelling loss, with logits only where a label stands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layalign.packing import IGNORE_INDEX
from layalign.rows import Rows


@contextmanager
def rows_for_logits(head: nn.Module, rows: Rows) -> Iterator[list[Tensor]]:
    """Within the block, ``head`` does not run: it returns its input (1, N, D) at the positions of ``rows``.

    Yields:
        The tensors it has returned so far.
    """
    returned: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        returned.append(rows.select(hidden))
        return returned[-1]

    before = head.__dict__.get("forward")
    head.__dict__["forward"] = forward
    try:
        yield returned
    finally:
        del head.__dict__["forward"]
        if before is not None:
            head.__dict__["forward"] = before


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
