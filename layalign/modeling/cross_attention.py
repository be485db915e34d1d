"""One layer's attention to the source, in a pass of the LLM. What a call leaves makes the layer's next call cheaper."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from layalign.modeling.cache import SourceKeyValues
from layalign.modeling.identity import is_capturing
from layalign.nn.cross_attention import GatedCrossAttention, computes_the_reference
from layalign.nn.inspection import has_hooks, is_exactly, is_intercepted, is_repatched
from layalign.ops import cached_launch
from layalign.ops.cached_launch import CachedDecode, side_by_side
from layalign.ops.gated_cross_attention import MAX_DECODE_ROWS


class OnePass:
    """One pass of the LLM: the source that its layers attend to, and state that belongs to this pass alone.

    Passes over one source may be nested, or run in several threads.

    Args:
        source: what the layers attend to.
        gated: L modules in the order of ``source.layers``, which hold the gates.
        seen: collects the LLM layers that attended, so that a dropped source is noticed. None: nothing is collected.

    Attributes:
        ready: by LLM layer, the cached launch that may answer its call; empty where gradients are recorded.
    """

    def __init__(
        self, source: SourceKeyValues, gated: Sequence[GatedCrossAttention], seen: set[int] | None = None
    ) -> None:
        self.source, self.gated, self.seen = source, tuple(gated), seen
        self.ready: dict[int, CachedDecode] = {}
        self._keys, self._values, self._mask = source.keys, source.values, source.mask

    def prepare(self) -> None:
        """Find the cached launches of this pass. What all layers have in common is checked once, here."""
        source = self.source
        if not source.launches or self.seen is not None or not cached_launch.possible():
            return
        if is_repatched(GatedCrossAttention) or not computes_the_reference():
            return
        for index, (layer, module) in enumerate(zip(source.layers, self.gated, strict=True)):
            if (cached := source.launches.get(layer)) is None:
                continue
            if type(module) is not GatedCrossAttention or has_hooks(module) or "forward" in module.__dict__:
                continue
            mask = source.mask_on(self._keys[index].device) if source.masks else self._mask
            own = self._keys[index], self._values[index], module.effective_gate(), mask, module.impl
            if cached.prepare(*own):
                self.ready[layer] = cached

    def attend(
        self, layer: int, query: Tensor, residual: Tensor, scale: float | None, *, overwrite: bool = False
    ) -> Tensor:
        """``residual`` plus the gated attention of an LLM layer to the source.

        Args:
            layer: index of the LLM layer. For one that is not a language layer, ``residual`` is returned.
            query: (B, H, T, d), as self-attention uses it; B counts the rows that share a row of the source.
            residual: (B, T, H, d), the self-attention's output before its output projection.
            scale: factor on the scores; None is 1 / sqrt(d).
            overwrite: whether the result may be written into ``residual``, because nobody else holds it.
        """
        copies, shape = self.source.copies, residual.shape
        if copies == 1 or shape[0] % copies or not self._reads_rows_alike(layer):
            return self._attend(layer, query, residual, scale, overwrite)
        # Rows that share a row of the source are further query rows of it: it is read once for all of them.
        query = query.unflatten(0, (-1, copies)).transpose(1, 2).flatten(2, 3)  # (B / copies, H, copies * T, d)
        residual = residual.reshape(-1, copies * shape[1], *shape[2:])
        return self._attend(layer, query, residual, scale, overwrite).reshape(shape)

    def _reads_rows_alike(self, layer: int) -> bool:
        """Whether a layer's module treats every query row alike, and nothing watches it."""
        if layer in self.ready:
            return True
        if layer not in self.source.layers:
            return False
        module = self.gated[self.source.layers.index(layer)]
        return type(module) is GatedCrossAttention and (torch.compiler.is_compiling() or not is_intercepted(module))

    def _attend(self, layer: int, query: Tensor, residual: Tensor, scale: float | None, overwrite: bool) -> Tensor:
        # First, and short: Python is slow between the LLM's products. Compiled graphs must not guard on the launches.
        ready = None if torch.compiler.is_compiling() else self.ready.get(layer)
        if ready is not None and self._holds() and (result := ready(query, residual, scale, overwrite)) is not None:
            return result
        if layer not in self.source.layers:
            return residual
        if self.seen is not None:
            self.seen.add(layer)
        return self._in_full(layer, query, residual, scale)

    def _holds(self) -> bool:
        """Whether the source is still the one with which the pass began, and gradients are still not recorded."""
        now = self.source
        same = now.keys is self._keys and now.values is self._values and now.mask is self._mask
        return same and not torch.is_grad_enabled() and not (now.masks and now.has_written_masks())

    def _in_full(self, layer: int, query: Tensor, residual: Tensor, scale: float | None) -> Tensor:
        """Call the layer's module."""
        source, compiling = self.source, torch.compiler.is_compiling()
        index = source.layers.index(layer)
        module = self.gated[index]
        key, value = _states(source, index, query)
        mask = source.mask_on(query.device)
        if (copies := source.copies) > 1 and query.shape[0] == key.shape[0] * copies:
            key, value = key.repeat_interleave(copies, 0), value.repeat_interleave(copies, 0)
            mask = None if mask is None else mask.repeat_interleave(copies, 0)
        result = module(query, key, value, residual=residual, key_mask=mask, scale=scale)
        # What a hook or another class does cannot be cached.
        if not compiling and is_exactly(module, GatedCrossAttention):
            inputs = query, key, value, module.effective_gate(), residual, mask
            recording = torch.is_grad_enabled()  # a pass that records gradients would not use it
            source.launches[layer] = None if recording else CachedDecode.after(inputs, scale, module.impl)
        return result


def _states(source: SourceKeyValues, index: int, query: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's keys and values as its call takes them. The source keeps them so, unless they need gradients."""
    key, value, device = source.keys[index], source.values[index], query.device
    if torch.compiler.is_compiling() or key.requires_grad or value.requires_grad:
        return key.to(device), value.to(device)
    if not key.device == value.device == device:
        with torch.inference_mode(False):  # a training pass over the same source may follow
            key, value = key.to(device), value.to(device)
        if is_capturing(device):
            return key, value
    if query.shape[2] <= MAX_DECODE_ROWS:
        key, value = side_by_side(key, value)
    if key is not source.keys[index] or value is not source.values[index]:
        source.keys = (*source.keys[:index], key, *source.keys[index + 1 :])
        source.values = (*source.values[:index], value, *source.values[index + 1 :])
    return key, value


@contextmanager
def one_pass(
    source: SourceKeyValues, gated: Sequence[GatedCrossAttention], seen: set[int] | None = None
) -> Iterator[OnePass]:
    """For a block that runs one pass of the LLM: yields the object that its layers get. Arguments as there."""
    one = OnePass(source, gated, seen)
    one.prepare()
    try:
        yield one
    finally:
        one.ready.clear()  # whoever still holds it calls the modules


class _ReentrantCheckpointBridge(torch.autograd.Function):
    """Carry gradients of the source's keys and values around re-entrant checkpoints.

    A re-entrant checkpoint handles positional tensors only, and the source travels by keyword. Its backward would walk
    into the graph that all layers share once per layer, and fail the second time. So the layers get detached leaves,
    whose ``.grad`` sums up the layers' shares. This node is on the LLM's input, so its backward runs after those of all
    layers, and hands the sums on.
    """

    @staticmethod
    def forward(ctx: Any, leaves: Sequence[Tensor], inputs_embeds: Tensor, *states: Tensor) -> Tensor:
        ctx.leaves = leaves
        return inputs_embeds.view_as(inputs_embeds)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, grad, *(leaf.grad for leaf in ctx.leaves)


def bridge(inputs_embeds: Tensor, source: SourceKeyValues) -> tuple[Tensor, SourceKeyValues]:
    """(inputs_embeds, source) whose gradients survive re-entrant gradient checkpointing."""
    states = (*source.keys, *source.values)
    leaves = [state.detach().requires_grad_(state.requires_grad) for state in states]
    embeds = _ReentrantCheckpointBridge.apply(leaves, inputs_embeds, *states)
    half = len(source.keys)
    return embeds, replace(source, keys=tuple(leaves[:half]), values=tuple(leaves[half:]))
