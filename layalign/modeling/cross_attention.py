"""One layer's attention to the source, in a pass of the LLM; and what its last call left to make the next one short."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from layalign.modeling.cache import SourceStates
from layalign.nn.cross_attention import GatedCrossAttention, computes_the_reference
from layalign.nn.inspection import has_hooks, is_exactly, is_repatched
from layalign.ops import cached_launch
from layalign.ops.cached_launch import Ready, side_by_side
from layalign.ops.gated_cross_attention import MAX_DECODE_ROWS


class OnePass:
    """A source in one pass of the LLM, with what belongs to this pass alone.

    Passes over one source may be nested, or run in several threads.

    Args:
        source: what the layers attend to.
        gated: L modules in the order of ``source.layers``, which hold the gates.
        seen: collects the LLM layers that attended, so that a dropped source can be noticed; None where nobody asks.

    Attributes:
        ready: by LLM layer, what may answer its call.
    """

    def __init__(
        self, source: SourceStates, gated: Sequence[GatedCrossAttention], seen: set[int] | None = None
    ) -> None:
        self.source, self.gated, self.seen = source, tuple(gated), seen
        self.ready: dict[int, Ready] = {}
        self._keys, self._values, self._mask = source.keys, source.values, source.mask
        self._grad = torch.is_grad_enabled()

    def prepare(self) -> None:
        """Ask what the calls of all layers have in common, once."""
        source = self.source
        if not (self._grad or source.launches) or self.seen is not None or not cached_launch.possible():
            return
        if is_repatched(GatedCrossAttention) or not computes_the_reference():
            return
        for slot, (layer, module) in enumerate(zip(source.layers, self.gated, strict=True)):
            if type(module) is not GatedCrossAttention or has_hooks(module) or "forward" in module.__dict__:
                continue
            gate = module.effective_gate()
            if self._grad and getattr(gate, "grad_fn", None) is not None:
                continue  # its graph belongs into the layer's call, which a checkpoint makes twice
            own = self._keys[slot], self._values[slot], gate, self._mask, module.impl
            if (ready := cached_launch.ready(source.launches.get(layer), *own)) is not None:
                self.ready[layer] = ready

    def attend(
        self, layer: int, query: Tensor, base: Tensor, scale: float | None, *, overwrite: bool = False
    ) -> Tensor:
        """``base`` (B, T, H, d) plus the gated attention of LLM layer ``layer``; other layers return ``base``.

        ``overwrite``: nobody else holds ``base``; the result may be written there.
        """
        # First, and little of it: between the LLM's products all Python comes slowly. Graphs must not guard it.
        ready = None if torch.compiler.is_compiling() else self.ready.get(layer)
        if ready is not None and self._holds() and (found := ready(query, base, scale, overwrite)) is not None:
            return found
        if layer not in self.source.layers:
            return base
        if self.seen is not None:
            self.seen.add(layer)
        return self._in_full(layer, query, base, scale, ready)

    def _holds(self) -> bool:
        """Whether the source is what it was when the pass began, and gradients are wanted as then."""
        now = self.source
        same = now.keys is self._keys and now.values is self._values and now.mask is self._mask
        return same and torch.is_grad_enabled() == self._grad

    def _in_full(self, layer: int, query: Tensor, base: Tensor, scale: float | None, tried: Ready | None) -> Tensor:
        """By the layer's module; ``tried`` did not answer this call."""
        source, compiling = self.source, torch.compiler.is_compiling()
        slot = source.layers.index(layer)
        module = self.gated[slot]
        if not compiling and query.shape[2] <= MAX_DECODE_ROWS:
            key, value = side_by_side(source.keys[slot], source.values[slot])
            if key is not source.keys[slot] or value is not source.values[slot]:
                source.keys = (*source.keys[:slot], key, *source.keys[slot + 1 :])
                source.values = (*source.values[:slot], value, *source.values[slot + 1 :])
        key, value = source.keys[slot].to(query.device), source.values[slot].to(query.device)
        mask = None if source.mask is None else source.mask.to(query.device)
        found = module(query, key, value, base=base, key_mask=mask, scale=scale)
        # What a hook or another class does to the gate is not known here.
        if not compiling and is_exactly(module, GatedCrossAttention):
            inputs = query, key, value, module.effective_gate(), base, mask
            source.launches[layer] = cached_launch.after(tried, inputs, scale, module.impl)
        return found


@contextmanager
def one_pass(
    source: SourceStates, gated: Sequence[GatedCrossAttention], seen: set[int] | None = None
) -> Iterator[OnePass]:
    """Around one pass of the LLM, whose layers are given what this yields; arguments as there."""
    one = OnePass(source, gated, seen)
    one.prepare()
    try:
        yield one
    finally:
        one.ready.clear()  # a checkpoint that runs a layer again in the backward asks anew


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
