"""Attention maps as inline SVG. The browser draws the tokens, so any script for which it has a font is readable."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from layalign.experiments.analysis.result import AttentionMap
from layalign.experiments.charts import heat_map


def map_svg(shown: AttentionMap, slot: int) -> str:
    """The map of one layer as an `<svg>` element. Rows are LLM tokens, columns source tokens; darker is more.

    Args:
        shown: the maps.
        slot: index of the layer in them.
    """
    weights = shown.weights[slot]
    return heat_map(
        weights, shown.rows, shown.columns, cell=(16, 16), limit=1.0, slanted=True, picture=_pixels(np.array(weights))
    )


def _pixels(weights: np.ndarray) -> bytes:
    """One pixel per weight, as PNG; the largest weight of the map is the darkest."""
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, weights, cmap="Blues", vmin=0.0, vmax=float(weights.max()) or 1.0, format="png")
    return buffer.getvalue()


def caption(shown: AttentionMap, slot: int, layer: int, gates: Sequence[float] | None) -> str:
    """The caption above a map."""
    weights = shown.weights[slot]
    largest, uniform = max(max(row) for row in weights), 1 / len(shown.columns)
    gate = "" if gates is None else f"gate {gates[slot]:+.3f}, "
    return f"LLM layer {layer}: {gate}largest weight {largest:.2f} (darkest; uniform attention would be {uniform:.3f})"
