"""Continuous batching: sequences are decoded together and may join or leave between any two steps.

The batch is padded on the left, like `layalign.modeling.llm_inputs`. Positions count real tokens and padding is masked,
so the result of a row does not depend on the other rows (except for rounding in another matrix shape). A joining
sequence is prefilled separately, then its cache is concatenated with the others. When a sequence leaves, its row and
the padding that no other row needs are removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from layalign.modeling.cache import SourceKeyValues, get_source, set_source
from layalign.modeling.llm_inputs import real_positions
from layalign.nn.inspection import device_of
from layalign.utils.versions import cache_of


@dataclass(frozen=True)
class Inputs:
    """One sequence in the collator's layout, without padding.

    Attributes:
        source: encoder token ids.
        packed: the LLM's input, [bos][source slots][boundary slot][prompt].
    """

    source: tuple[int, ...]
    packed: tuple[int, ...]


@dataclass
class State:
    """The model's state for B sequences.

    Attributes:
        lengths: number of real tokens in the cache, for each of the B sequences.
        sources: number of real source tokens, for each of the B sequences.
        cache: keys and values (B, G, max(lengths), d) per layer, padded on the left, and those of the source, padded on
            the right.
    """

    lengths: list[int]
    sources: list[int]
    cache: Any

    @property
    def width(self) -> int:
        """Length of the cache: that of the longest sequence."""
        return max(self.lengths)


class Decoder:
    """Runs steps of a LayAlign model on a changing batch; not thread-safe.

    Args:
        model: a `LayAlignForCausalLM` in eval mode.
        encoder_pad: the encoder's padding token id.
    """

    def __init__(self, model: Any, encoder_pad: int) -> None:
        self.model, self.encoder_pad = model, encoder_pad
        self.device = device_of(model.get_input_embeddings())
        # A model that attends to padding (as published) gives the answer of a single request only without padding.
        self.together = bool(model.config.mask_encoder_padding)

    @torch.no_grad()
    def prefill(self, rows: Sequence[Inputs]) -> tuple[State, Tensor]:
        """Encode the sources of new sequences and prefill their prompts.

        Returns:
            The state of these B sequences only, and the logits (B, V), float32, of their first tokens.
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
        # Without a configuration, layers with sliding windows keep all keys too. The mask alone makes the window, so
        # rows of any length can be concatenated.
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
        """Append one token to each of the B sequences; returns the logits (B, V), float32, of the next ones.

        Modifies the state's cache and lengths in place.
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
        fill, side = (self.model.config.source_token_id, "left") if left else (self.encoder_pad, "right")
        tokens = [torch.tensor(row, dtype=torch.long) for row in rows]
        filled = pad_sequence(tokens, batch_first=True, padding_value=fill, padding_side=side)
        real = pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True, padding_side=side)
        return {ids: filled.to(self.device), mask: real.to(self.device)}


def merged(first: State, second: State) -> State:
    """Concatenate two states, the sequences of `first` before those of `second`."""
    width = max(first.width, second.width)
    layers = [
        tuple(torch.cat([_to_width(one, width), _to_width(two, width)]) for one, two in zip(mine, other, strict=True))
        for mine, other in zip(_layers(first.cache), _layers(second.cache), strict=True)
    ]
    one, two = get_source(first.cache), get_source(second.cache)
    assert one is not None and two is not None
    lengths, sources = first.lengths + second.lengths, first.sources + second.sources
    size = max(sources)

    def joined(*parts: Tensor) -> Tensor:
        return torch.cat([F.pad(tensor, (0, 0, 0, size - tensor.shape[2])) for tensor in parts])

    mask = None
    if one.keys:  # needed even if the model attends to padding: these rows had none and get some now
        device = one.keys[0].device
        mask = torch.arange(size, device=device) < torch.tensor(sources, device=device)[:, None]
    source = SourceKeyValues(
        one.layers, tuple(map(joined, one.keys, two.keys)), tuple(map(joined, one.values, two.values)), mask
    )
    return State(lengths, sources, _cache(layers, source))


def kept(state: State, rows: Sequence[int]) -> State:
    """The state of some of the sequences, in the given order; padding that none of them needs is removed."""
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
