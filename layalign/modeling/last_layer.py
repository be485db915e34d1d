"""The LLM's last layer, computed only where its result is read.

Behind the last layer's keys and values a position matters only if its logits are wanted: those in front of a label in
training, the last one in a generation's first pass. The layer's query map, output map and feed-forward block are called
for these positions alone, which are the same numbers for less work: of the LLM's 1 / L, what the other positions' share
of it is. Nothing is known of an architecture but where its layers and maps lie; :meth:`LastLayer.reason_against` says
what is in the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from layalign.modeling.decoders import FEED_FORWARD_BLOCKS, OUTPUT_MAPS, QUERY_MAPS, attention_modules
from layalign.nn.inspection import is_altered, is_watched
from layalign.nn.rows import KEYWORD, Rows, only_rows, running
from layalign.utils.errors import ArgumentError
from layalign.utils.versions import importing

with importing():
    from transformers.pytorch_utils import Conv1D

MOST = 0.75  # share of the positions above which copying them costs more than it saves

_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.Softplus, nn.Tanh, nn.Sigmoid,
    nn.Hardswish, nn.Hardsigmoid,
)  # fmt: skip
_POSITION_WISE = (nn.Linear, Conv1D, nn.Identity, nn.Dropout, nn.ModuleDict, nn.ModuleList, nn.ParameterDict)
# What a call may ask for: transformers' own hooks collect it.
_COLLECTED = ("output_hidden_states", "output_attentions", "output_router_logits")


def position_wise(module: nn.Module) -> bool:
    """Whether ``module`` is made of linear maps and activations as their classes are, and draws no random numbers now.

    A linear map of another type may look at all positions at once, as int8 products do for outliers.
    """
    for part in module.modules():
        if next(part.children(), None) is not None:
            continue
        if is_altered(part):
            return False
        known = type(part) in (*_POSITION_WISE, *_ACTIVATIONS) or type(part).__module__ == "transformers.activations"
        if not known or (isinstance(part, nn.Dropout) and part.training and part.p > 0):
            return False
    return True


def _bodies(llm: nn.Module) -> list[nn.Module]:
    """What lies between ``llm`` and the module that holds its layers, from the outside; empty if nothing is found."""
    path: list[nn.Module] = []
    module = llm
    for name, _ in list(attention_modules(llm).values())[:1]:
        for part in name.split("."):
            module = module.get_submodule(part)
            if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
                return path
            path.append(module)
    return []


class LastLayer:
    """Finds the last decoder layer of an LLM, once; its maps are looked at in every call.

    Args:
        llm: a causal LM.
        choice: "auto", "always" or "never", see :class:`layalign.LayAlignConfig`.
    """

    def __init__(self, llm: nn.Module, choice: str = "auto") -> None:
        self.choice = choice
        self.last: str = "not asked yet"  # what was done for the last call, and why
        self._path: list[nn.Module] = []  # the LLM, and what lies between it and the list of layers; empty if none is
        self.bodies = _bodies(llm)
        found = attention_modules(llm)
        if not found:
            return
        name, self._attention = found[max(found)]
        *path, container, _, _ = ["", *name.split(".")] if name.count(".") >= 2 else ["", "", "", ""]
        layers = llm.get_submodule(".".join([*path[1:], container]))
        beside = [layer for layer in layers.children() if any(part is self._attention for part in layer.modules())]
        if isinstance(layers, nn.ModuleList) and len(beside) == 1 and beside[0] is layers[-1]:
            self._container, self._layer = container, layers[-1]
            self._path = [llm.get_submodule(".".join(path[1 : i + 1])) for i in range(len(path))]

    def maps(self) -> list[nn.Module]:
        """The position-wise maps behind the layer's keys and values."""
        found = [getattr(self._layer, name, None) for name in FEED_FORWARD_BLOCKS]
        found += [getattr(self._attention, name, None) for name in (*QUERY_MAPS, *OUTPUT_MAPS)]
        return [module for module in found if isinstance(module, nn.Module)]

    def reason_against(self, rows: Rows, options: dict[str, Any]) -> str | None:
        """Why all positions are to be computed; None if only ``rows``.

        Args:
            options: the keyword arguments of the LLM's call.
        """
        if self.choice == "never":
            return "prune_last_layer='never'"
        if self.choice == "auto" and len(rows) > MOST * rows.shape.numel():
            return "nearly all positions are wanted"
        if not self._path or getattr(self._path[-1], self._container)[-1] is not self._layer:
            return "the LLM has no list of layers that ends with its last attention"
        config = self._path[0].config
        if any(options.get(name) or getattr(config, name, False) for name in _COLLECTED):
            return "states of all positions are asked for"
        one = options.get(KEYWORD)
        return self._reason_against_modules(() if one is None else one.gated)

    def _reason_against_modules(self, beside: Iterable[nn.Module]) -> str | None:
        if self._layer.training and getattr(self._layer, "gradient_checkpointing", False):
            return "the layer's activations are checkpointed: it runs again in the backward"
        if any(getattr(part, "_compiled_call_impl", None) is not None for part in (*self._path, self._layer)):
            return "a part of the LLM is compiled"
        if any(is_watched(module) for module in (*self._observers(), *beside)):
            return "hooks want to see the last layer"
        maps = self.maps()
        if not maps:
            return f"{type(self._layer).__name__} has no map of a known name"
        for module in maps:
            if not position_wise(module):
                return f"{type(module).__name__} is not made of linear maps and activations alone, or drops out"
        return None

    def _observers(self) -> Iterator[nn.Module]:
        """The modules whose results would show that positions are missing."""
        yield from self._layer.modules()
        for module in self._path:
            yield module
            yield from (child for child in module.children() if not isinstance(child, nn.ModuleList))

    @contextmanager
    def only(self, rows: Rows | None, options: dict[str, Any]) -> Iterator[None]:
        """Within the block, the last layer of the pass with ``options`` is computed for ``rows`` alone.

        Where nothing speaks against it. Other passes within this one, and parts called by themselves, are whole.

        Raises:
            ArgumentError: "always", and something speaks against it.
        """
        if rows is None or torch.compiler.is_compiling():
            yield
            return
        against = self.reason_against(rows, options)
        self.last = f"whole: {against}" if against else f"{len(rows)} of {rows.shape.numel()} positions"
        if against and self.choice == "always":
            raise ArgumentError(f"prune_last_layer: expected 'auto' or 'never' for this call, got 'always': {against}")
        if against:
            yield
            return
        with running(self._layer, options[KEYWORD]) as active, only_rows(self.maps(), rows, active=active):
            yield
