"""What the LLM attends to: the keys and values of one batch of sources, and the cache that carries them. Data only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from layalign.modeling.identity import Identity, is_capturing, reason_against_watching

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


@dataclass
class SourceKeyValues:
    """The source's keys and values for each language layer, ready for gated cross-attention.

    Attributes:
        layers: indices of the LLM layers that attend, ascending or not; the other tuples follow this order.
        keys, values: L tensors (B, G, S, d) each; heads and head size may differ between layers.
        mask: (B, S) bool, true where a source token is real; None when padding is attended to, as published.
        real: (B, S), 1 where a source token is real, if ``mask`` is None; None if it is unknown.
        copies: how many consecutive rows of the LLM's batch share one of the B rows, as the beams of a sequence do.
        launches: by LLM layer, what its last call left for the next one (:mod:`layalign.modeling.cross_attention`).
        masks: by device, what ``mask`` was and its copy there.
    """

    layers: tuple[int, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor | None
    real: Tensor | None = None
    copies: int = 1
    launches: dict[int, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    masks: dict[torch.device, tuple[Identity, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __getstate__(self) -> dict[str, Any]:  # launches and identities hold addresses of this object's tensors
        return {**self.__dict__, "launches": {}, "masks": {}}

    def mask_on(self, device: torch.device) -> Tensor | None:
        """``mask`` on a device, copied once for all layers and steps there; again after a write to ``mask``.

        A write that no version counter shows (to an inference tensor, by ``.data``) follows the rules of
        :mod:`layalign.modeling.identity`: an inference tensor is copied in every call.
        """
        mask = self.mask
        if mask is None or mask.device == device:
            return mask
        if torch.compiler.is_compiling() or reason_against_watching([mask]) or is_capturing(device):
            return mask.to(device)
        if device in self.masks and not self.has_written_masks():
            return self.masks[device][1]
        self.masks = {on: kept for on, kept in self.masks.items() if kept[0].of([mask])}
        with torch.inference_mode(False):  # a training pass over the same source may follow
            copy = mask.to(device)
        self.masks[device] = Identity([mask]), copy
        return copy

    def has_written_masks(self) -> bool:
        """Whether a copy of :meth:`mask_on` is not ``mask`` any more."""
        return any(self.mask is None or not seen.of([self.mask]) for seen, _ in self.masks.values())

    def map(self, function: Callable[[Tensor], Tensor]) -> SourceKeyValues:
        """A copy with ``function`` applied to every tensor; the batch is the first dimension of all of them."""
        return replace(
            self,
            keys=tuple(function(key) for key in self.keys),
            values=tuple(function(value) for value in self.values),
            mask=None if self.mask is None else function(self.mask),
            real=None if self.real is None else function(self.real),
        )

    def for_gradients(self) -> SourceKeyValues:
        """The same keys and values. Those made in inference mode are copied, because autograd cannot save them."""
        tensors = *self.keys, *self.values, self.mask
        if not any(tensor is not None and tensor.is_inference() for tensor in tensors):
            return self
        return self.map(lambda tensor: tensor.clone() if tensor.is_inference() else tensor)

    @property
    def lengths(self) -> Tensor | None:
        """(B * copies, 1), the numbers of real source tokens; None if they are unknown."""
        real = self.real if self.mask is None else self.mask
        return None if real is None else real.sum(dim=1, keepdim=True).repeat_interleave(self.copies, dim=0)

    @property
    def rows(self) -> int | None:
        """B * copies, or None without any tensor."""
        return next((len(t) * self.copies for t in (*self.keys[:1], self.mask, self.real) if t is not None), None)

    def select(self, rows: Tensor) -> SourceKeyValues:
        """The rows ``rows`` of the LLM's batch (int64 indices), in that order.

        If rows share states and each stays with its own, this object: nothing is copied. A device is waited for then,
        as beam search does in every step.
        """
        if self.copies > 1:
            rows = rows // self.copies
            own = torch.arange(self.rows or 0, device=rows.device) // self.copies
            if torch.equal(rows, own):
                return self
        there = functools.cache(rows.to)  # one copy for all tensors of a device
        return replace(self.map(lambda tensor: tensor.index_select(0, there(tensor.device))), copies=1)

    def repeat(self, times: int) -> SourceKeyValues:
        """Every row ``times`` times, the copies side by side in memory of their own."""
        return self if times == 1 else self.map(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def share(self, times: int) -> SourceKeyValues:
        """The same for a batch of which every row is repeated ``times`` times, as ``generate`` expands it."""
        return self if times == 1 else replace(self, copies=self.copies * times)

    def to(self, device: torch.device | str) -> SourceKeyValues:
        """A copy on another device."""
        return self.map(lambda tensor: tensor.to(device))


class _SourceCacheMixin:
    """A key/value cache that also holds a source and treats the source's batch dimension like its own."""

    source: SourceKeyValues

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(max(protocol, 2))  # one form for all protocols
        return (_empty_cache, type(self).__bases__[1:], *reduced[2:])  # type: ignore[index]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.source = self.source.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.source = self.source.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.source = self.source.select(indices)


class SourceDynamicCache(_SourceCacheMixin, DynamicCache):
    """transformers' default cache with a source. It is a named class: compiled code cannot change an object's class."""


_CACHE_CLASSES: dict[type, type] = {DynamicCache: SourceDynamicCache}


def _source_cache_class(cache_class: type) -> type:
    if cache_class not in _CACHE_CLASSES:
        bases = (_SourceCacheMixin, cache_class)
        _CACHE_CLASSES[cache_class] = type(f"Source{cache_class.__name__}", bases, {})
    return _CACHE_CLASSES[cache_class]


def _empty_cache(cache_class: type) -> Any:
    cls: Any = _source_cache_class(cache_class)  # pickle cannot find it by name
    return cls.__new__(cls)


def source_cache(cache: Cache) -> Cache:
    """Let ``cache`` carry a source. It stays the same object and an instance of its old class.

    The model does this by itself, except in a compiled call: do it before you compile a first pass over a cache.
    """
    if not isinstance(cache, _SourceCacheMixin):
        cache.__class__ = _source_cache_class(type(cache))  # works for any cache, static and quantised ones too
    return cache


def set_source(cache: Cache, source: SourceKeyValues) -> Cache:
    """Put ``source`` into ``cache``."""
    if torch.compiler.is_compiling() and not isinstance(cache, _SourceCacheMixin):
        torch._dynamo.graph_break(
            msg="past_key_values: expected a cache from layalign.modeling.cache.source_cache(cache) or one that "
            "carries a source already; compiled code cannot change the class of another"
        )
    source_cache(cache).source = source  # type: ignore[attr-defined]
    return cache


def get_source(cache: Any) -> SourceKeyValues | None:
    """The source that ``cache`` carries, or None."""
    return getattr(cache, "source", None)
