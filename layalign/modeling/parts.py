"""The trainable parts of a model, in the sizes that its configuration gives."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from layalign.modeling.decoders import key_value_modules
from layalign.nn import Adapter, EncoderAligner, GatedCrossAttention
from layalign.nn.inspection import device_of
from layalign.utils.errors import ArgumentError

if TYPE_CHECKING:
    from layalign.modeling.configuration import LayAlignConfig


def build_trainable_modules(config: LayAlignConfig) -> tuple[Adapter | None, EncoderAligner | None, nn.ModuleList]:
    """New adapter, aligner and gates for a configuration; None for an adapter or aligner that it does not have."""
    aligner = config.aligner()
    adapter = None
    if config.use_adapter:
        adapter = Adapter(
            aligner.encoder_hidden_dim, aligner.language_hidden_dim, config.adapter_size, config.adapter_fusion,
            len(config.fused_layers) or None,
        )  # fmt: skip
    layers = config.language_layers or ()
    gates = nn.ModuleList(GatedCrossAttention(config.impl, config.fixed_gate) for _ in layers)
    return adapter, EncoderAligner(aligner, impl=config.impl) if layers else None, gates


def gate_devices(attentions: Sequence[nn.Module], home: torch.device) -> list[torch.device]:
    """The devices on which self-attention modules attend, each for its layer's gate; ``home`` where it is unknown."""
    found = []
    for attention in attentions:
        weighted: Any = next((each for each in key_value_modules(attention) if hasattr(each, "weight")), None)
        place = home if weighted is None else device_of(weighted)
        found.append(home if place.type == "meta" else place)  # offloaded by a hook that only a wrapper knows
    return found


def trained_parameters(config: LayAlignConfig) -> int:
    """How many numbers train in adapter, aligner and gates."""
    with torch.device("meta"):
        parts = build_trainable_modules(config)
    return sum(p.numel() for part in parts if part is not None for p in part.parameters() if p.requires_grad)


def matching_adapter_size(config: LayAlignConfig) -> int:
    """The width with which an adapter alone has as many trained parameters as LayAlign.

    LayAlign means here a model of these settings with learned gates in all LLM layers and the published adapter. An
    adapter of width w has w (D_e + D_l + 1) parameters, and others that do not depend on w. So the two numbers differ
    by at most (D_e + D_l + 1) / 2.

    Args:
        config: with the configurations of both parts, an adapter, and no language layers.

    Raises:
        ArgumentError: the configuration is not one of an adapter alone, or the fusion alone has more parameters.
    """
    if config.encoder_config is None or config.llm_config is None:
        raise ArgumentError("config: expected encoder_config and llm_config")
    if not config.use_adapter or config.language_layers:
        raise ArgumentError("adapter_size: 'match' is for an adapter alone, without language layers")
    full, narrow = copy(config), copy(config)
    full.language_layers = list(range(config.get_text_config().num_hidden_layers))
    full.adapter_size, full.adapter_fusion, full.fixed_gate = None, None, None
    narrow.adapter_size = 1
    sizes = config.aligner()
    step = sizes.encoder_hidden_dim + sizes.language_hidden_dim + 1
    missing = trained_parameters(full) - trained_parameters(narrow)
    if missing < 0:
        raise ArgumentError(f"adapter_size: the fusion alone has {-missing} parameters more than LayAlign")
    return 1 + round(missing / step)
