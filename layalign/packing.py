"""The LLM's input layout: ``[bos] [source slots] [boundary slot] [prompt] [labels]``, padded once, on the left.

Source: LayAlign, translation and task stage. The published code builds the same layout by concatenating padded
blocks and squeezing the padding out afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layalign.errors import ArgumentError

IGNORE_INDEX = -100


def pack(
    source_lengths: Sequence[int],
    prompts: Sequence[Sequence[int]] | None = None,
    targets: Sequence[Sequence[int]] | None = None,
    *,
    bos_token_id: int | None,
    source_token_id: int,
    device: torch.device | str | None = None,
) -> dict[str, torch.Tensor]:
    """Lay out a batch for the LLM.

    Args:
        source_lengths: B numbers of real (unpadded) encoder tokens; each gets one slot.
        prompts: B lists of LLM token ids that follow the boundary, or None.
        targets: B lists of LLM token ids to predict (end-of-sequence included by the caller), or None.
        bos_token_id: first token of every row; None for LLMs that have none.
        source_token_id: id that fills slots and padding; the model replaces the slots' embeddings, so any id does.

    Returns:
        ``input_ids`` and ``attention_mask``, both (B, T) int64, left-padded; with targets also ``labels`` (B, T), -100
        where nothing is predicted.

    Raises:
        ArgumentError: the arguments describe different batch sizes, or a source length is negative.
    """
    batch = len(source_lengths)
    if batch == 0:
        raise ArgumentError("source_lengths: expected at least one row, got none")
    for name, rows in (("prompts", prompts), ("targets", targets)):
        if rows is not None and len(rows) != batch:
            raise ArgumentError(f"{name}: expected {batch} rows (one per source length), got {len(rows)}")
    if min(source_lengths) < 0:
        raise ArgumentError(f"source_lengths: expected numbers >= 0, got {min(source_lengths)}")

    bos = [] if bos_token_id is None else [bos_token_id]
    heads = [
        bos + [source_token_id] * (int(length) + 1) + list(prompts[i] if prompts is not None else ())
        for i, length in enumerate(source_lengths)
    ]
    tails = [list(row) for row in targets] if targets is not None else [[] for _ in range(batch)]
    width = max(len(head) + len(tail) for head, tail in zip(heads, tails, strict=True))

    input_ids, attention_mask, labels = [], [], []
    for head, tail in zip(heads, tails, strict=True):
        padding = width - len(head) - len(tail)
        input_ids.append([source_token_id] * padding + head + tail)
        attention_mask.append([0] * padding + [1] * (len(head) + len(tail)))
        labels.append([IGNORE_INDEX] * (padding + len(head)) + tail)
    packed = {
        "input_ids": torch.tensor(input_ids, dtype=torch.long, device=device),
        "attention_mask": torch.tensor(attention_mask, dtype=torch.long, device=device),
    }
    if targets is not None:
        packed["labels"] = torch.tensor(labels, dtype=torch.long, device=device)
    return packed


def real_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids that count real tokens only: (B, T) 0/1 -> (B, T)."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
