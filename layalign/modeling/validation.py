"""Checks of the ids, masks and labels that a model is called with, before wrong ones give wrong results silently."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from layalign.modeling.llm_inputs import IGNORE_INDEX, MAX_LENGTH
from layalign.ops.checks import FLOAT_DTYPES, describe, is_plain
from layalign.utils.errors import ArgumentError

_INTEGERS = (torch.int64, torch.int32)
_MASKS = (torch.bool, torch.uint8, *_INTEGERS, *FLOAT_DTYPES)


def _require(name: str, value: Any, dtypes: tuple[torch.dtype, ...], what: str) -> bool:
    """Check type and length. Returns whether there are numbers that can be read without waiting for a device."""
    if torch.compiler.is_compiling():
        return False
    if not is_plain(value) or value.dtype not in dtypes or value.dim() != 2:
        raise ArgumentError(f"{name}: expected {what}, got {describe(value)}")
    if value.shape[1] > MAX_LENGTH:
        raise ArgumentError(f"{name}: expected at most {MAX_LENGTH} tokens, got {value.shape[1]}")
    return type(value) is Tensor and value.device.type == "cpu" and value.numel() > 0


def require_ids(name: str, ids: Any, embeddings: nn.Module | None) -> None:
    """Check token ids (B, S). Compiled code checks nothing; only on the CPU they are checked against the vocabulary.

    Raises:
        ArgumentError: they are not token ids.
    """
    if not _require(name, ids, _INTEGERS, "token ids, two-dimensional int64"):
        return
    size = getattr(embeddings, "num_embeddings", None)
    if isinstance(size, int):
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= size:
            raise ArgumentError(f"{name}: expected ids in 0..{size - 1}, got {low if low < 0 else high}")


def require_mask(name: str, mask: Any) -> None:
    """Check a mask (B, S). Compiled code checks nothing; only on the CPU its numbers must be zeros and ones.

    Raises:
        ArgumentError: it is not a mask.
    """
    at_hand = _require(name, mask, _MASKS, "zeros and ones, two-dimensional")
    if at_hand and mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise ArgumentError(f"{name}: expected zeros and ones, got other numbers")


def require_labels(labels: Any, shape: torch.Size, size: int | None) -> None:
    """Check labels of ``shape`` (B, T), token ids or -100, as :func:`require_ids` does.

    Raises:
        ArgumentError: they are not labels of this shape.
    """
    at_hand = _require("labels", labels, (torch.int64,), "token ids or -100, two-dimensional int64")
    if not torch.compiler.is_compiling() and labels.shape != shape:
        raise ArgumentError(f"labels: expected the shape {tuple(shape)} of input_ids, got {tuple(labels.shape)}")
    if at_hand and isinstance(size, int):
        wrong = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= size))
        if bool(wrong.any()):
            raise ArgumentError(f"labels: expected ids in 0..{size - 1} or -100, got {int(labels[wrong][0])}")
