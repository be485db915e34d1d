"""Continuous batching: sequences that are decoded together, and may join and leave between any two steps.

The batch is padded on the left, as `layalign.modeling.llm_inputs` pads; positions count real tokens, and padding is
masked, so a row's numbers do not depend on its neighbours (beyond the rounding of another matrix shape). A joining
sequence is prefilled by itself and its cache put beside the others; a leaving one is cut out, and so is padding no row
needs any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from layalign.modeling.cache import SourceKeyValues, get_source, set_source
from layalign.modeling.llm_inputs import real_positions
from layalign.nn.inspection import device_of
from layalign.utils.versions import cache_of


@dataclass(frozen=True)
class Inputs:
    """One sequence as the collator lays it out, without padding.

    Attributes:
        source: encoder token ids.
        packed: the LLM's input, [bos][source slots][boundary slot][prompt].
    """

    source: tuple[int, ...]
    packed: tuple[int, ...]


@dataclass
class State:
    """What the model knows of B sequences.

    Attributes:
        lengths: B numbers of real tokens in the cache.
        sources: B numbers of real source tokens.
        cache: holds (B, G, max(lengths), d) per layer, padded on the left, and the source's states, padded on the
            right.
    """

    lengths: list[int]
    sources: list[int]
    cache: Any

    @property
    def width(self) -> int:
        """Length of the cache: that of the longest sequence."""
        return max(self.lengths)


class Decoder:
    """Steps of a LayAlign model over a changing batch; not thread-safe.

    Args:
        model: a `LayAlignForCausalLM` in eval mode.
        encoder_pad: id that fills encoder padding.
    """

    def __init__(self, model: Any, encoder_pad: int) -> None:
        self.model, self.encoder_pad = model, encoder_pad
        self.device = device_of(model.get_input_embeddings())
        # As published, padding is attended to: then only a source without any gives the single request's answer.
        self.together = bool(model.config.mask_encoder_padding)

    @torch.no_grad()
    def prefill(self, rows: Sequence[Inputs]) -> tuple[State, Tensor]:
        """Encode the sources of new sequences and read their prompts.

        Returns:
            The state of these B sequences alone, and the logits (B, V), float32, of their first tokens.
        """
        if len(rows) > 1 and not self.together:
            parts = [self.prefill([row]) for row in rows]
            state = parts[0][0]
            for other, _ in parts[1:]:
                state = merged(state, other)
            return state, torch.cat([logits for _, logits in parts])
        batch = {
            **self._padded("encoder_input_ids", "encoder_attention_mask", [row.source for row in rows], left=False),
            **self._padded("input_ids", "attention_mask", [row.packed for row in rows], left=True),
        }
        # Without a configuration every layer keeps all keys, sliding windows too: the mask alone makes the window, and
        # rows of any age can be put side by side.
        cache = DynamicCache()
        output = self.model(
            **batch,
            position_ids=real_positions(batch["attention_mask"]),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        state = State([len(row.packed) for row in rows], [len(row.source) for row in rows], cache_of(output))
        return state, output.logits[:, -1].float()

    @torch.no_grad()
    def step(self, state: State, tokens: Sequence[int]) -> Tensor:
        """Append one token to each of the B sequences; the logits (B, V), float32, of the next ones.

        The state's cache and lengths change in place.
        """
        width = state.width + 1
        positions = torch.tensor(state.lengths, device=self.device)[:, None]
        mask = (torch.arange(width, device=self.device) >= width - 1 - positions).long()
        output = self.model(
            input_ids=torch.tensor(tokens, device=self.device)[:, None],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=state.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        state.lengths = [length + 1 for length in state.lengths]
        state.cache = cache_of(output)
        return output.logits[:, -1].float()

    def _padded(self, ids: str, mask: str, rows: Sequence[Sequence[int]], left: bool) -> dict[str, Tensor]:
        width, fill = max(map(len, rows)), self.model.config.source_token_id if left else self.encoder_pad
        filled, real = [], []
        for row in rows:
            padding = width - len(row)
            before, behind = (padding, 0) if left else (0, padding)
            filled.append([fill] * before + list(row) + [fill] * behind)
            real.append([0] * before + [1] * len(row) + [0] * behind)
        return {ids: torch.tensor(filled, device=self.device), mask: torch.tensor(real, device=self.device)}


def merged(first: State, second: State) -> State:
    """Both states' sequences side by side, those of `first` before those of `second`."""
    width = max(first.width, second.width)
    layers = [
        tuple(torch.cat([_to_width(one, width), _to_width(two, width)]) for one, two in zip(mine, other, strict=True))
        for mine, other in zip(_layers(first.cache), _layers(second.cache), strict=True)
    ]
    source = _beside(get_source(first.cache), get_source(second.cache), first.sources, second.sources)
    return State(first.lengths + second.lengths, first.sources + second.sources, _cache(layers, source))


def kept(state: State, rows: Sequence[int]) -> State:
    """The state of some of the sequences, in the given order; padding that none of them needs is cut off."""
    lengths, sources = [state.lengths[row] for row in rows], [state.sources[row] for row in rows]
    width, size = max(lengths), max(sources)
    index = torch.tensor(rows)
    layers = [
        tuple(tensor[:, :, -width:].index_select(0, index.to(tensor.device)) for tensor in layer)
        for layer in _layers(state.cache)
    ]
    source = get_source(state.cache)
    assert source is not None
    source = source.select(index).map(lambda t: t[:, :size] if t.dim() == 2 else t[:, :, :size].contiguous())
    return State(lengths, sources, _cache(layers, source))


def _layers(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _cache(layers: Sequence[Any], source: SourceKeyValues) -> Any:
    cache = DynamicCache()
    for index, (keys, values) in enumerate(layers):
        cache.update(keys, values, index)
    return set_source(cache, source)


def _to_width(tensor: Tensor, width: int) -> Tensor:
    return F.pad(tensor, (0, 0, width - tensor.shape[2], 0))


def _beside(
    first: SourceKeyValues | None, second: SourceKeyValues | None, sizes: Sequence[int], others: Sequence[int]
) -> SourceKeyValues:
    assert first is not None and second is not None
    size = max(*sizes, *others)

    def joined(one: Tensor, two: Tensor) -> Tensor:
        return torch.cat([F.pad(tensor, (0, 0, 0, size - tensor.shape[2])) for tensor in (one, two)])

    mask = None
    if first.keys:  # also where padding was attended to: these rows had none, and now get some
        device = first.keys[0].device
        mask = torch.arange(size, device=device) < torch.tensor([*sizes, *others], device=device)[:, None]
    return SourceKeyValues(
        first.layers,
        tuple(map(joined, first.keys, second.keys)),
        tuple(map(joined, first.values, second.values)),
        mask,
    )
