"""The LLM's input layout: ``[bos] [source slots] [boundary slot] [prompt] [labels]``, padded once, on the left.

Source: LayAlign, translation and task stage. The published code builds the same layout by concatenating padded
blocks and removing the padding afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from layalign.nn.rows import Rows
from layalign.ops.checks import require_true
from layalign.utils.errors import ArgumentError, refuse, whole_number

IGNORE_INDEX = -100
MAX_LENGTH = 2**24  # of a source, in tokens: a longer one would take all memory before any model runs


def build_inputs(
    source_lengths: Sequence[int],
    prompts: Sequence[Sequence[int]] | None = None,
    targets: Sequence[Sequence[int]] | None = None,
    *,
    bos_token_id: int | None,
    source_token_id: int,
    slots: bool = True,
    device: torch.device | str | None = None,
) -> dict[str, torch.Tensor]:
    """Lay out a batch for the LLM.

    Args:
        source_lengths: B numbers of real (unpadded) encoder tokens; each gets one slot.
        prompts: B lists of LLM token ids that follow the boundary, or None.
        targets: B lists of LLM token ids to predict (end-of-sequence included by the caller), or None.
        bos_token_id: first token of every row; None for LLMs that have none.
        source_token_id: id that fills slots and padding; the model replaces the slots' embeddings, so any id does.
        slots: False for a model without an adapter, whose input has neither source slots nor boundary slot.

    Returns:
        ``input_ids`` and ``attention_mask``, both (B, T) int64, left-padded; with targets also ``labels`` (B, T), -100
        where nothing is predicted.

    Raises:
        ArgumentError: the arguments describe different batch sizes, or a source length is negative.
    """
    source_lengths = _ids("source_lengths", source_lengths, "a list of whole numbers")
    batch = len(source_lengths)
    if batch == 0:
        raise ArgumentError("source_lengths: expected at least one row, got none")
    if max(source_lengths) > MAX_LENGTH:
        raise ArgumentError(f"source_lengths: expected at most {MAX_LENGTH}, got {max(source_lengths)}")
    for name, token in (("bos_token_id", bos_token_id), ("source_token_id", source_token_id)):
        if token is not None or name == "source_token_id":
            whole_number(name, token, least=0)
    _check_place(slots, device)
    prompts, targets = _rows("prompts", prompts), _rows("targets", targets)
    for name, rows in (("prompts", prompts), ("targets", targets)):
        if rows is not None and len(rows) != batch:
            raise ArgumentError(f"{name}: expected {batch} rows (one per source length), got {len(rows)}")
    if min(source_lengths) < 0:
        raise ArgumentError(f"source_lengths: expected numbers >= 0, got {min(source_lengths)}")

    bos = [] if bos_token_id is None else [bos_token_id]
    heads = [
        bos + [source_token_id] * (length + 1 if slots else 0) + (prompts[i] if prompts is not None else [])
        for i, length in enumerate(source_lengths)
    ]
    tails: list[list[int]] = targets if targets is not None else [[] for _ in range(batch)]
    width = max(len(head) + len(tail) for head, tail in zip(heads, tails, strict=True))
    if not all(heads):
        raise ArgumentError(
            "prompts: expected text for every row where there are neither source slots nor a first token"
        )

    input_ids, attention_mask, labels = [], [], []
    for head, tail in zip(heads, tails, strict=True):
        padding = width - len(head) - len(tail)
        input_ids.append([source_token_id] * padding + head + tail)
        attention_mask.append([0] * padding + [1] * (len(head) + len(tail)))
        labels.append([IGNORE_INDEX] * (padding + len(head)) + tail)
    inputs = {
        "input_ids": torch.tensor(input_ids, dtype=torch.long, device=device),
        "attention_mask": torch.tensor(attention_mask, dtype=torch.long, device=device),
    }
    if targets is not None:
        inputs["labels"] = torch.tensor(labels, dtype=torch.long, device=device)
    return inputs


def _ids(name: str, row: Any, expected: str) -> list[int]:
    """A row of whole numbers, which may come from numpy or torch; lists of ints, as from the collator, pass quickly."""
    try:
        listed = None if isinstance(row, str | bytes | Mapping) else list(row)
    except TypeError:
        listed = None
    if listed is None:
        refuse(name, expected, row)
    row = listed
    if set(map(type, row)) <= {int} and (not row or max(row) < 2**63):
        return row
    # Sums of a floating mask are whole numbers too.
    return [whole_number(name, int(n) if isinstance(n, float) and n.is_integer() else n) for n in row]


def _rows(name: str, rows: Any) -> list[list[int]] | None:
    if rows is None:
        return None
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable) or getattr(rows, "ndim", 1) == 0:
        refuse(name, "a list of lists of token ids", rows)
    return [_ids(name, row, "lists of token ids") for row in rows]


def _check_place(slots: Any, device: Any) -> None:
    if not isinstance(slots, bool):
        refuse("slots", "true or false", slots)
    if device is None or isinstance(device, torch.device):
        return
    try:
        torch.device(device)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        refuse("device", "a torch device", device)


def real_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids that count real tokens only: (B, T) of zeros and ones -> (B, T) int64."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


@dataclass(frozen=True)
class Layout:
    """Where the source's slots are in the LLM's input.

    Attributes:
        lengths: (B, 1), the numbers of real source tokens.
        slot: (B, T) int64, each position's distance from its row's first slot.
        is_slot: (B, T) bool, whether it is a slot or the boundary.
    """

    lengths: torch.Tensor
    slot: torch.Tensor
    is_slot: torch.Tensor

    def embed(
        self,
        embeds: torch.Tensor,
        soft: torch.Tensor,
        boundary: torch.Tensor,
        source_mask: torch.Tensor,
        real: Rows | None = None,
    ) -> torch.Tensor:
        """``embeds`` with soft tokens and boundary in their slots.

        Args:
            embeds: (B, T, D_l), the embeddings of the LLM's input ids.
            soft: (B, S, D_l), the adapter's soft tokens; with ``real`` (1, N, D_l), those of the real tokens.
            boundary: (1, 1, D_l).
            source_mask: (B, S), 1 where a source token is real.
            real: the N real tokens, or None.

        Returns:
            (B, T, D_l).
        """
        device, batch = self.slot.device, len(self.slot)
        at_boundary = self.slot == self.lengths
        boundary = boundary.to(soft.dtype)
        if real is not None:  # all rows' soft tokens in turn, then a boundary for each row
            count, first = soft.shape[1], self.lengths.cumsum(0) - self.lengths
            own = torch.arange(count, count + batch, device=device)[:, None]
            place = torch.where(at_boundary, own, (first + self.slot).clamp(0, count - 1))
            rows = torch.cat([soft[0], boundary[0].expand(batch, -1)]).to(device)
            rows = rows.index_select(0, place.flatten()).unflatten(0, place.shape)
            return torch.where(self.is_slot[..., None], rows, embeds)
        # Real tokens first, in order, wherever the encoder's padding is. The boundary is ranked last.
        rank = F.pad(source_mask.bool().logical_not().to(torch.uint8), (0, 1), value=2)
        order = rank.argsort(dim=1, stable=True).to(device)
        index = torch.where(at_boundary, soft.shape[1], self.slot.clamp(0, max(soft.shape[1] - 1, 0)))
        order = order.gather(1, index)
        rows = torch.cat([soft, boundary.expand(batch, 1, -1)], dim=1).to(device)
        rows = rows.gather(1, order[..., None].expand(-1, -1, rows.shape[-1]))
        return torch.where(self.is_slot[..., None], rows, embeds)


@dataclass(frozen=True)
class LLMInputs:
    """The LLM's input as :func:`build_inputs` lays it out.

    Attributes:
        input_ids, attention_mask: (B, T) int64.
        has_bos: whether a first token comes before the source slots.
        source_token_id: what fills the slots.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    has_bos: bool
    source_token_id: int

    def layout(self, source_mask: torch.Tensor, wait: bool = True) -> Layout:
        """Where the source's slots are, checked.

        Args:
            source_mask: (B, S), 1 where a source token is real.
            wait: whether the host waits for the result of the check, see :func:`layalign.ops.checks.require_true`.

        Raises:
            ArgumentError: the slots do not match ``source_mask`` (not checked in compiled code).
        """
        lengths = source_mask.sum(dim=1, keepdim=True).to(self.input_ids.device)
        slot, is_slot = self.slots(lengths)
        if not torch.compiler.is_compiling():
            self.check(lengths, is_slot, wait)
        return Layout(lengths, slot, is_slot)

    def slots(self, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the source's slots are.

        Args:
            lengths: (B, 1), the numbers of real source tokens.

        Returns:
            Both (B, T): each position's distance from the first slot, int64, and whether it is a slot or the boundary.
        """
        start = self.attention_mask.long().argmax(dim=1, keepdim=True) + self.has_bos
        slot = torch.arange(self.input_ids.shape[1], device=self.input_ids.device) - start
        return slot, (slot >= 0) & (slot <= lengths)

    def check(self, lengths: torch.Tensor, is_slot: torch.Tensor, wait: bool = True) -> None:
        """Compare ids and mask with what :meth:`slots` found for ``lengths``. ``wait``: see :meth:`layout`.

        Raises:
            ArgumentError: they do not match.
        """
        good = (self.input_ids == self.source_token_id) & self.attention_mask.bool() | ~is_slot
        complete = is_slot.sum(dim=1, keepdim=True) == lengths + 1
        message = (
            "input_ids: expected [bos][one slot per encoder token][boundary slot][text] as model.build_inputs lays "
            "it out; the slots do not match encoder_attention_mask"
        )
        require_true(good.all() & complete.all(), message, wait=wait)
