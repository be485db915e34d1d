"""Checks of the ids, masks and labels that a model is called with, before wrong ones give wrong results silently."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from layalign.modeling.llm_inputs import IGNORE_INDEX, MAX_LENGTH
from layalign.ops.checks import FLOAT_DTYPES, describe, is_plain, require_true
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


def require_index(name: str, index: Any, wanted: Tensor) -> None:
    """Check positions (N,): where ``wanted`` (B, S) is true, in the flattened tensor, ascending.

    On the CPU they are looked at. A GPU looks at them by itself (:func:`layalign.ops.checks.require_true`).

    Raises:
        ArgumentError: they are not these positions.
    """
    if torch.compiler.is_compiling():
        return
    if not is_plain(index) or index.dtype != torch.int64 or index.dim() != 1 or index.device != wanted.device:
        raise ArgumentError(f"{name}: expected int64 positions (N,) on {wanted.device}, got {describe(index)}")
    flat = wanted.flatten().bool()
    message = f"{name}: expected the positions of all tokens that are computed, ascending, in the flattened batch"
    if index.device.type == "cpu":
        good = torch.tensor(torch.equal(index, flat.nonzero().flatten()))
    else:
        # As many as are wanted, in ascending order, each wanted: these are all.
        good = flat.index_select(0, index).all() & (flat.sum() == len(index)) & (index.diff() > 0).all()
    require_true(good, message, wait=False)


def require_labels(labels: Any, size: int | None) -> None:
    """Check labels (B, T), token ids or -100, as :func:`require_ids` does.

    Raises:
        ArgumentError: they are not labels.
    """
    at_hand = _require("labels", labels, (torch.int64,), "token ids or -100, two-dimensional int64")
    if at_hand and isinstance(size, int):
        wrong = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= size))
        if bool(wrong.any()):
            raise ArgumentError(f"labels: expected ids in 0..{size - 1} or -100, got {int(labels[wrong][0])}")
