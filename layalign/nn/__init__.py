"""Drop-in modules with the parameters and outputs of the published classes, computed by layalign's operations."""

from layalign.nn.adapter import Adapter, Mapping
from layalign.nn.aligner import EncoderAligner, WeightedLinearProjector
from layalign.nn.cross_attention import GatedCrossAttention

__all__ = ["Adapter", "EncoderAligner", "GatedCrossAttention", "Mapping", "WeightedLinearProjector"]
