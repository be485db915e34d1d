"""The LLM's last layer, computed only where its result is read.

After the last layer's keys and values, a position matters only if its logits are read: in training the positions before
a label, in the first pass of a generation the last one. The layer's query map, output map and feed-forward block run
for these positions alone. The results are the same. What is saved is the other positions' share of one layer. All that
is known of an architecture is where its layers and maps are. :meth:`LastLayer.reason_against` says why all positions
must be computed.
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
# Outputs that a call may ask for, which transformers' own hooks collect.
_COLLECTED = ("output_hidden_states", "output_attentions", "output_router_logits")


def position_wise(module: nn.Module) -> bool:
    """Whether ``module`` is made of unmodified linear maps and activations, and draws no random numbers now.

    A linear map of another type may read all positions at once, as int8 products do for outliers.
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


def _path_to_layers(llm: nn.Module) -> tuple[list[nn.Module], str]:
    """``llm`` and the modules down to its list of layers, and the list's name; nothing if there is no such list."""
    path = [llm]
    for name, _ in list(attention_modules(llm).values())[:1]:
        for part in name.split("."):
            module = path[-1].get_submodule(part)
            if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
                return path, part
            path.append(module)
    return [], ""


class LastLayer:
    """The last decoder layer of an LLM. It is found once; its maps are checked in every call.

    Args:
        llm: a causal LM.
        choice: "auto", "always" or "never", see :class:`layalign.LayAlignConfig`.
    """

    def __init__(self, llm: nn.Module, choice: str = "auto") -> None:
        self.choice = choice
        self.last: str = "not asked yet"  # what was done for the last call, and why
        path, self._container = _path_to_layers(llm)
        self.bodies = path[1:]  # the modules between the LLM and its list of layers, outermost first
        self._path: list[nn.Module] = []  # with the LLM; empty if no list ends with the last attention
        if not path:
            return
        attentions, layers = attention_modules(llm), path[-1].get_submodule(self._container)
        _, self._attention = attentions[max(attentions)]
        holders = [layer for layer in layers.children() if any(part is self._attention for part in layer.modules())]
        if isinstance(layers, nn.ModuleList) and len(holders) == 1 and holders[0] is layers[-1]:
            self._layer, self._path = layers[-1], path

    def maps(self) -> list[nn.Module]:
        """The layer's position-wise maps, other than those of its keys and values."""
        maps = [getattr(self._layer, name, None) for name in FEED_FORWARD_BLOCKS]
        maps += [getattr(self._attention, name, None) for name in (*QUERY_MAPS, *OUTPUT_MAPS)]
        return [module for module in maps if isinstance(module, nn.Module)]

    def reason_against(self, rows: Rows, options: dict[str, Any]) -> str | None:
        """Why all positions must be computed; None if ``rows`` suffice.

        Args:
            rows: the positions whose logits are read.
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
            return "outputs of all positions are asked for"
        source_pass = options.get(KEYWORD)
        return self._reason_against_modules(() if source_pass is None else source_pass.gated)

    def _reason_against_modules(self, gated: Iterable[nn.Module]) -> str | None:
        if self._layer.training and getattr(self._layer, "gradient_checkpointing", False):
            return "the layer's activations are checkpointed: it runs again in the backward"
        if any(getattr(part, "_compiled_call_impl", None) is not None for part in (*self._path, self._layer)):
            return "a part of the LLM is compiled"
        if any(is_watched(module) for module in (*self._observers(), *gated)):
            return "hooks observe the last layer"
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
        """Within the block, the last layer of the pass with ``options`` is computed for ``rows`` alone, if it can be.

        Passes nested in this one, and modules that are called by themselves, compute all positions.

        Raises:
            ArgumentError: the choice is "always", and it cannot be.
        """
        if rows is None or torch.compiler.is_compiling():
            yield
            return
        against = self.reason_against(rows, options)
        self.last = f"in full: {against}" if against else f"{len(rows)} of {rows.shape.numel()} positions"
        if against and self.choice == "always":
            raise ArgumentError(f"prune_last_layer: expected 'auto' or 'never' for this call, got 'always': {against}")
        if against:
            yield
            return
        with running(self._layer, options[KEYWORD]) as active, only_rows(self.maps(), rows, active=active):
            yield
