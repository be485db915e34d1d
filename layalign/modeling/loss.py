"""The language-modelling loss, with logits only at positions that have a label."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layalign.modeling.llm_inputs import IGNORE_INDEX
from layalign.nn.rows import put_around


@contextmanager
def passing_on(head: nn.Module, states: list[Tensor]) -> Iterator[list[Tensor]]:
    """Within the block, ``head`` returns its input, without running, if this has the shape of ``states[0]``.

    Args:
        states: a list that by then holds the hidden states that leave the LLM's body in this call and thread. It is
            emptied at the end of the block.

    Yields:
        The tensors that ``head`` has passed on so far.
    """
    thread = threading.get_ident()
    returned: list[Tensor] = []

    def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        own = threading.get_ident() == thread and states and len(args) == 1 and not kwargs
        if not own or getattr(args[0], "shape", None) != states[0].shape:
            return forward(*args, **kwargs)
        returned.append(args[0])
        return args[0]

    with put_around(head, run):
        try:
            yield returned
        finally:
            states.clear()


def label_loss(logits: Tensor, targets: Tensor, divisor: Tensor | int | None) -> Tensor:
    """Cross-entropy in fp32 (fp64 for fp64) over labelled positions, divided by their number (or by ``divisor``)."""
    targets = targets.to(logits.device).flatten()
    wide = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(wide.flatten(0, -2), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return divided(total, targets, divisor)


def divided(total: Tensor, targets: Tensor, divisor: Tensor | int | None) -> Tensor:
    """A summed loss divided by the number of labels among ``targets``, or by ``divisor``."""
    if divisor is None:
        divisor = (targets != IGNORE_INDEX).sum().clamp(min=1)
    elif isinstance(divisor, Tensor):  # Trainer counts on its batch's device, the LLM may end on another
        divisor = divisor.to(total.device)
    return total / divisor


def with_loss(output: Any, loss: Tensor, logits: Tensor | None) -> Any:
    """The LLM's output object with another loss and other logits, its fields in transformers' order."""
    return type(output)(**{**output, "loss": loss, "logits": logits})
