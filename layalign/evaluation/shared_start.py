"""What all prompts of a batch begin with, such as the examples before a question, is read once."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicLayer

from layalign.modeling.llm_inputs import real_positions
from layalign.utils.versions import cache_of


@torch.no_grad()
def read_start(llm: Any, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
    """Read the tokens that all rows begin with, once, and lay the batch out as [start] [padding] [rest].

    The start ends before the last token of the shortest row, so that a token is left of every row.

    Args:
        llm: a causal language model of transformers.
        batch: `input_ids` and `attention_mask` (B, T) int64, padded on the left.

    Returns:
        The batch, now (B, T') and with `position_ids`; and the cache of its first columns. Where there is no start, or
        the LLM cannot have padding inside, the batch as it was and None.
    """
    rows = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    shortest = min(map(len, rows)) - 1
    same = torch.stack([row[:shortest] for row in rows])
    start = int((same == same[0]).all(0).long().cumprod(0).sum())
    # Without a start this reads a token for nothing: sharded weights need as many passes in every process.
    cache = cache_of(llm(input_ids=rows[0][None, : max(start, 1)], use_cache=True, logits_to_keep=1))
    layers = getattr(cache, "layers", ())
    movable = layers and all(type(layer) is DynamicLayer for layer in layers)  # no window, no running state
    if not start or not movable or "position_ids" not in inspect.signature(llm.forward).parameters:
        return batch, None
    cache.batch_repeat_interleave(len(rows))
    own = [row[start:] for row in rows]
    rest, real = (
        pad_sequence(each, batch_first=True, padding_side="left") for each in (own, [torch.ones_like(r) for r in own])
    )
    ids = torch.cat([same[:, :start], rest], dim=1)
    mask = torch.cat([torch.ones_like(same[:, :start]), real], dim=1)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": real_positions(mask)}, cache
