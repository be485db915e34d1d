"""What a model is called with, checked before an embedding or a mask makes of it what it likes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from layalign.modeling.llm_inputs import IGNORE_INDEX, MAX_LENGTH
from layalign.ops.checks import describe, is_plain
from layalign.utils.errors import ArgumentError

_WHOLE = (torch.int64, torch.int32)
_MASKS = (
    torch.bool,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
)


def _require(name: str, value: Any, dtypes: tuple[torch.dtype, ...], what: str) -> None:
    if not is_plain(value) or value.dtype not in dtypes or value.dim() != 2:
        raise ArgumentError(f"{name}: expected {what}, got {describe(value)}")
    if value.shape[1] > MAX_LENGTH:
        raise ArgumentError(f"{name}: expected at most {MAX_LENGTH} tokens, got {value.shape[1]}")


def _values_at_hand(value: Tensor) -> bool:
    """Whether looking at the numbers costs no wait for a device, and there are some."""
    return type(value) is Tensor and value.device.type == "cpu" and value.numel() > 0


def require_ids(name: str, ids: Any, embeddings: nn.Module | None) -> None:
    """Token ids (B, S) of the vocabulary; nothing is checked in compiled code, the vocabulary on the CPU alone.

    Raises:
        ArgumentError: they are none.
    """
    if torch.compiler.is_compiling():
        return
    _require(name, ids, _WHOLE, "token ids, two-dimensional int64")
    size = getattr(embeddings, "num_embeddings", None)
    if isinstance(size, int) and _values_at_hand(ids):
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= size:
            raise ArgumentError(f"{name}: expected ids in 0..{size - 1}, got {low if low < 0 else high}")


def require_mask(name: str, mask: Any) -> None:
    """A mask (B, S) of zeros and ones; nothing is checked in compiled code, the numbers on the CPU alone."""
    if torch.compiler.is_compiling():
        return
    _require(name, mask, _MASKS, "zeros and ones, two-dimensional")
    if _values_at_hand(mask) and mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise ArgumentError(f"{name}: expected zeros and ones, got other numbers")


def require_labels(labels: Any, shape: torch.Size, size: int | None) -> None:
    """Labels of ``shape`` (B, T), ids of the vocabulary or -100; where and when checked as for ids."""
    if torch.compiler.is_compiling():
        return
    _require("labels", labels, (torch.int64,), "token ids or -100, two-dimensional int64")
    if labels.shape != shape:
        raise ArgumentError(f"labels: expected the shape {tuple(shape)} of input_ids, got {tuple(labels.shape)}")
    if isinstance(size, int) and _values_at_hand(labels):
        wrong = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= size))
        if bool(wrong.any()):
            raise ArgumentError(f"labels: expected ids in 0..{size - 1} or -100, got {int(labels[wrong][0])}")
