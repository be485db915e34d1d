"""What the LLM attends to: the key and value states of one batch of sources, and the cache that carries them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from layalign.nn.cross_attention import GatedCrossAttention, computes_the_reference
from layalign.nn.inspection import has_hooks, is_exactly, is_repatched
from layalign.ops import cached_launch, dispatch
from layalign.ops.cached_launch import Ready, RepeatedDecode, side_by_side
from layalign.ops.gated_cross_attention import MAX_DECODE_ROWS

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


@dataclass
class SourceStates:
    """Per language layer the source's keys and values, ready for gated cross-attention.

    Attributes:
        layers: indices of the LLM layers that attend, ascending or not; the other tuples follow this order.
        keys, values: L tensors (B, G, S, d) each; heads and head size may differ between layers.
        mask: (B, S) bool, true where a source token is real; None when padding is attended to, as published.
        attentions: L modules that hold the gates.
        real: (B, S), 1 where a source token is real, when ``mask`` is None; None when nobody knows.
    """

    layers: tuple[int, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor | None
    attentions: tuple[GatedCrossAttention, ...]
    real: Tensor | None = None
    # By LLM layer: what the last call left for the next.
    _again: dict[int, RepeatedDecode | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:  # launches kept for the next call hold addresses of this one's tensors
        return {**self.__dict__, "_again": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> SourceStates:
        for module in self.attentions:
            memo.setdefault(id(module), module)  # the gates stay the model's
        copied = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def map(self, function: Callable[[Tensor], Tensor]) -> SourceStates:
        """The same states with ``function`` applied to every tensor (all have the batch first)."""
        return replace(
            self,
            keys=tuple(function(key) for key in self.keys),
            values=tuple(function(value) for value in self.values),
            mask=None if self.mask is None else function(self.mask),
            real=None if self.real is None else function(self.real),
        )

    def for_gradients(self) -> SourceStates:
        """The same states, copied where they were made in inference mode: a backward could not save them."""
        tensors = *self.keys, *self.values, self.mask
        if not any(tensor is not None and tensor.is_inference() for tensor in tensors):
            return self
        return self.map(lambda tensor: tensor.clone() if tensor.is_inference() else tensor)

    @property
    def lengths(self) -> Tensor | None:
        """(B, 1), the numbers of real source tokens; None when nobody knows."""
        real = self.real if self.mask is None else self.mask
        return None if real is None else real.sum(dim=1, keepdim=True)

    @property
    def rows(self) -> int | None:
        """B, or None without any tensor."""
        return next((len(t) for t in (*self.keys[:1], self.mask, self.real) if t is not None), None)

    def select(self, rows: Tensor) -> SourceStates:
        """The states of the batch rows ``rows`` (int64 indices), in that order."""
        return self.map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def repeat(self, times: int) -> SourceStates:
        """Every row ``times`` times, the copies side by side, as ``generate`` expands its batch."""
        return self if times == 1 else self.map(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def to(self, device: torch.device | str) -> SourceStates:
        """The states on another device."""
        return self.map(lambda tensor: tensor.to(device))

    @contextmanager
    def one_pass(self, seen: set[int] | None = None) -> Iterator[OnePass]:
        """Around one pass of the LLM, whose layers are given what this yields; ``seen`` as there."""
        one = OnePass(self, seen)
        one.prepare()
        try:
            yield one
        finally:
            one.ready.clear()  # a checkpoint that runs a layer again in the backward asks anew

    def attend(
        self,
        layer: int,
        query: Tensor,
        base: Tensor,
        scale: float | None,
        *,
        overwrite: bool = False,
        tried: Ready | None = None,
    ) -> Tensor:
        """``base`` (B, T, H, d) plus the gated attention of LLM layer ``layer``; other layers return ``base``.

        ``overwrite``: nobody else holds ``base``; the result may be written there. ``tried``: it did not answer this.
        """
        if layer not in self.layers:
            return base
        slot = self.layers.index(layer)
        module = self.attentions[slot]
        if not torch.compiler.is_compiling() and query.shape[2] <= MAX_DECODE_ROWS:
            key, value = side_by_side(self.keys[slot], self.values[slot])
            if key is not self.keys[slot] or value is not self.values[slot]:
                self.keys = (*self.keys[:slot], key, *self.keys[slot + 1 :])
                self.values = (*self.values[:slot], value, *self.values[slot + 1 :])
        key, value = self.keys[slot].to(query.device), self.values[slot].to(query.device)
        mask = None if self.mask is None else self.mask.to(query.device)
        found = module(query, key, value, base=base, key_mask=mask, scale=scale)
        # What a hook or another class does to the gate is not known here.
        if not torch.compiler.is_compiling() and is_exactly(module, GatedCrossAttention):
            inputs = query, key, value, module.effective_gate(), base, mask
            self._again[layer] = cached_launch.after(tried, inputs, scale, module.impl)
        return found


class OnePass:
    """A source in one pass of the LLM, with what belongs to this pass alone.

    Passes over one source may be nested, or run in several threads.

    Args:
        source: what the layers attend to.
        seen: collects the LLM layers that attended, so that a dropped source can be noticed; None where nobody asks.

    Attributes:
        ready: by LLM layer, what may answer its call.
    """

    def __init__(self, source: SourceStates, seen: set[int] | None = None) -> None:
        self.source, self.seen = source, seen
        self.ready: dict[int, Ready] = {}
        self._keys, self._values, self._mask = source.keys, source.values, source.mask
        self._grad = torch.is_grad_enabled()

    def prepare(self) -> None:
        """Ask what the calls of all layers have in common, once."""
        source = self.source
        if not (self._grad or source._again) or self.seen is not None or not dispatch.undisturbed():
            return
        if is_repatched(GatedCrossAttention) or not computes_the_reference():
            return
        for slot, (layer, module) in enumerate(zip(source.layers, source.attentions, strict=True)):
            if type(module) is not GatedCrossAttention or has_hooks(module) or "forward" in module.__dict__:
                continue
            gate = module.effective_gate()
            if self._grad and getattr(gate, "grad_fn", None) is not None:
                continue  # its graph belongs into the layer's call, which a checkpoint makes twice
            own = self._keys[slot], self._values[slot], gate, self._mask, module.impl
            if (ready := cached_launch.ready(source._again.get(layer), *own)) is not None:
                self.ready[layer] = ready

    def attend(
        self, layer: int, query: Tensor, base: Tensor, scale: float | None, *, overwrite: bool = False
    ) -> Tensor:
        """As :meth:`SourceStates.attend`."""
        # First, and little of it: between the LLM's products all Python comes slowly. Graphs must not guard it.
        ready = None if torch.compiler.is_compiling() else self.ready.get(layer)
        if ready is not None and self._holds() and (found := ready(query, base, scale, overwrite)) is not None:
            return found
        if self.seen is not None and layer in self.source.layers:
            self.seen.add(layer)
        return self.source.attend(layer, query, base, scale, overwrite=overwrite, tried=ready)

    def _holds(self) -> bool:
        """Whether the source is what it was when the pass began, and gradients are wanted as then."""
        now = self.source
        same = now.keys is self._keys and now.values is self._values and now.mask is self._mask
        return same and torch.is_grad_enabled() == self._grad


class _SourceCacheMixin:
    """A key/value cache that also holds the source states and treats their batch dimension like its own."""

    source: SourceStates

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(max(protocol, 2))  # one form of it: the same for all protocols
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
    """transformers' default cache with a source. A class of its own: compiled code cannot change an object's class."""


_CACHE_CLASSES: dict[type, type] = {DynamicCache: SourceDynamicCache}


def _source_cache_class(cache_class: type) -> type:
    if cache_class not in _CACHE_CLASSES:
        bases = (_SourceCacheMixin, cache_class)
        _CACHE_CLASSES[cache_class] = type(f"Source{cache_class.__name__}", bases, {})
    return _CACHE_CLASSES[cache_class]


def _empty_cache(cache_class: type) -> Any:
    cls: Any = _source_cache_class(cache_class)  # which cannot be found by name
    return cls.__new__(cls)


def source_cache(cache: Cache) -> Cache:
    """Make ``cache`` one that can carry a source: the object stays the same, and an instance of its old class.

    The model does this by itself, except in a compiled call: do it before you compile a first pass over a cache.
    """
    if not isinstance(cache, _SourceCacheMixin):
        cache.__class__ = _source_cache_class(type(cache))  # any cache will do, static and quantised ones too
    return cache


def put_source(cache: Cache, source: SourceStates) -> Cache:
    """Let ``cache`` carry ``source``."""
    if torch.compiler.is_compiling() and not isinstance(cache, _SourceCacheMixin):
        torch._dynamo.graph_break(
            msg="past_key_values: expected a cache from layalign.modeling.source.source_cache(cache) or one that "
            "carries a source already; compiled code cannot change the class of another"
        )
    source_cache(cache).source = source  # type: ignore[attr-defined]
    return cache


def get_source(cache: Any) -> SourceStates | None:
    """The source states that ``cache`` carries, or None."""
    return getattr(cache, "source", None)


class _Bridge(torch.autograd.Function):
    """Carry gradients of the source states around re-entrant checkpoints.

    A re-entrant checkpoint sees only positional tensors; the source states travel by keyword. Its backward would walk
    into their shared graph once per layer and fail the second time. So the layers get detached leaves, whose ``.grad``
    collects every layer's share, and this node, which sits on the LLM's input and therefore runs after all layers,
    hands the sums on.
    """

    @staticmethod
    def forward(ctx: Any, leaves: Sequence[Tensor], inputs_embeds: Tensor, *states: Tensor) -> Tensor:
        ctx.leaves = leaves
        return inputs_embeds.view_as(inputs_embeds)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, grad, *(leaf.grad for leaf in ctx.leaves)


def bridge(inputs_embeds: Tensor, source: SourceStates) -> tuple[Tensor, SourceStates]:
    """(inputs_embeds, source) whose gradients survive re-entrant gradient checkpointing."""
    states = (*source.keys, *source.values)
    leaves = [state.detach().requires_grad_(state.requires_grad) for state in states]
    embeds = _Bridge.apply(leaves, inputs_embeds, *states)
    half = len(source.keys)
    return embeds, replace(source, keys=tuple(leaves[:half]), values=tuple(leaves[half:]))
