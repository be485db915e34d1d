"""The parts of a model that train, as its configuration gives their sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from layalign.nn import Adapter, EncoderAligner, GatedCrossAttention

if TYPE_CHECKING:
    from layalign.config import LayAlignConfig


def own_parts(config: LayAlignConfig) -> tuple[Adapter | None, EncoderAligner | None, nn.ModuleList]:
    """Adapter, aligner and gates of a configuration, fresh; None for those that it does without."""
    aligner = config.aligner()
    adapter = None
    if config.adapter:
        adapter = Adapter(aligner.encoder_hidden_dim, aligner.language_hidden_dim, config.adapter_size)
    layers = config.language_layers or ()
    gates = nn.ModuleList(GatedCrossAttention(config.impl, config.gate) for _ in layers)
    return adapter, EncoderAligner(aligner, impl=config.impl) if layers else None, gates
