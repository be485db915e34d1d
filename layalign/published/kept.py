"""The source's keys and values that swapped attention keeps, and what they were computed from."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layalign.modeling.decoders import key_value_modules
from layalign.modeling.identity import Identity, reason_against_watching, sample, unwritten
from layalign.nn.inspection import is_altered, parts
from layalign.nn.sharding import reason_whole_is_not_here
from layalign.ops import checks


@dataclass(frozen=True)
class KeptStates:
    """Keys and values (B, G, S, d), and what they were computed from: states and weights.

    The weights' memory is not held. Moving the LLM to another device frees it.
    """

    key: Tensor
    value: Tensor
    states: tuple[Tensor, ...]
    tensors: Identity  # the states, then the weights
    values: tuple[Tensor, ...]
    settings: tuple[Any, ...]
    modes: tuple[Any, ...]

    @staticmethod
    def of(
        attention: nn.Module, states: tuple[Tensor, ...], key: Tensor, value: Tensor, query: Tensor
    ) -> KeptStates | None:
        """None if a change of what they depend on could go unnoticed, or if a gradient is wanted."""
        made_with = None if attention.training else _made_with(attention)
        if made_with is None or key.requires_grad or value.requires_grad:
            return None
        weights, settings = made_with
        if any(w.is_meta or reason_whole_is_not_here(w) is not None for w in weights):
            return None
        tensors = states + weights
        if reason_against_watching(weights) is not None or not checks.can_read_memory(tensors):
            return None
        values = tuple(sample(tensor).clone() for tensor in tensors)
        return KeptStates(key, value, states, Identity(tensors), values, settings, _modes(query))

    def hold(self, attention: nn.Module, states: tuple[Tensor, ...], query: Tensor) -> bool:
        """Whether computing them again would give the same."""
        if attention.training or self.modes != _modes(query):
            return False
        made_with = _made_with(attention)
        if made_with is None or made_with[1] != self.settings:
            return False
        if torch.compiler.is_compiling():  # contents cannot be compared here: after a change, set other states
            return _same(self.states, states) and not torch.is_grad_enabled()
        tensors = states + made_with[0]
        if not self.tensors.of(tensors):
            return False
        if query.shape[2] > 1 and not unwritten(self.values, map(sample, tensors)):
            return False  # too slow for every step of a generation
        # A tensor made in inference mode cannot be saved for the gate's backward.
        return not torch.is_grad_enabled() or not (
            self.key.is_inference() or any(tensor.requires_grad for tensor in tensors)
        )


def _same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return len(first) == len(second) and all(map(operator.is_, first, second))


def _made_with(attention: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]] | None:
    """All tensors and settings besides the states that keys and values depend on; None if there may be others.

    Plain linear maps are known, and peft's LoRA around one. This runs at every step of ``generate``.
    """
    modules = attention._modules
    maps = modules.get("k_proj"), modules.get("v_proj")
    linear: Any
    tensors: list[Any] = []
    settings: list[Any] = []
    for linear in maps if None not in maps else key_value_modules(attention):
        if type(linear) is not nn.Linear and not _is_lora(linear):
            return None
        whole = (linear,) if type(linear) is nn.Linear else parts(linear)
        for part in whole:
            if is_altered(part) or part.training:  # dropout
                return None
            tensors += [tensor for tensor in part._parameters.values() if tensor is not None]
        if len(whole) > 1:
            adapters = tuple(linear.active_adapters), tuple(linear.merged_adapters), tuple(linear.scaling.items())
            settings += linear.disable_adapters, linear.cast_input_dtype_enabled, adapters
    return tuple(tensors), tuple(settings)


def _is_lora(linear: Any) -> bool:
    """Whether ``linear`` is peft's LoRA in its plain form around a plain map."""
    kind = type(linear)  # by name: peft is not imported for this
    known = kind.__module__ == "peft.tuners.lora.layer" and kind.__name__ == "Linear"
    return known and type(linear.base_layer) is nn.Linear and not linear.lora_variant


def _modes(query: Tensor) -> tuple[Any, ...]:
    """What keys and values depend on besides tensors and modules."""
    return query.device, checks.autocast_dtype(query), query.shape[0]
