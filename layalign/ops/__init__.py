"""The operations of LayAlign, each behind one public function with a choice of backend (``impl=``)."""

from layalign.ops.backends import register_backend
from layalign.ops.gated_cross_attention import gated_cross_attention
from layalign.ops.layer_mix import layer_mix
from layalign.ops.layer_projection import layer_projection

__all__ = ["gated_cross_attention", "layer_mix", "layer_projection", "register_backend"]
