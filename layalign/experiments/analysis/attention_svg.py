"""Attention maps as inline SVG. The browser draws the tokens, so any script for which it has a font is readable."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import numpy as np

from layalign.experiments.analysis.result import AttentionMap

CELL = 16
_LABEL = 96  # space for a token's label
_LONGEST = 12  # characters of a label
_COLOURS = "Blues"


def map_svg(shown: AttentionMap, slot: int) -> str:
    """The map of one layer as an `<svg>` element. Rows are LLM tokens, columns source tokens; darker is more.

    Args:
        shown: the maps.
        slot: index of the layer in them.
    """
    weights = np.array(shown.weights[slot], dtype=np.float64)
    width, height = CELL * weights.shape[1], CELL * weights.shape[0]
    # Space on the right too, for the last rotated label.
    size = f'width="{_LABEL + width + _LABEL // 2}" height="{_LABEL + height + 1}"'
    parts = [
        f'<svg {size} role="img" aria-label="attention of LLM tokens to source tokens">',
        f'<image x="{_LABEL}" y="{_LABEL}" width="{width}" height="{height}" preserveAspectRatio="none" '
        f'style="image-rendering: pixelated" href="data:image/png;base64,{_pixels(weights)}"/>',
        f'<rect x="{_LABEL}" y="{_LABEL}" width="{width}" height="{height}" fill="none" stroke="#bbb"/>',
    ]
    for row, label in enumerate(shown.rows):
        parts.append(f'<text x="{_LABEL - 4}" y="{_LABEL + CELL * row + 12}" text-anchor="end">{_text(label)}</text>')
    for column, label in enumerate(shown.columns):
        x, y = _LABEL + CELL * column + 12, _LABEL - 4
        parts.append(f'<text x="{x}" y="{y}" transform="rotate(-60 {x} {y})">{_text(label)}</text>')
    return "".join(parts) + "</svg>"


def _pixels(weights: np.ndarray) -> str:
    """One pixel per weight, as a base64 PNG; the largest weight of the map is the darkest."""
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, weights, cmap=_COLOURS, vmin=0.0, vmax=float(weights.max()) or 1.0, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def _text(label: str) -> str:
    short = label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "…"
    return html.escape(short)


def caption(shown: AttentionMap, slot: int, layer: int, gates: Sequence[float] | None) -> str:
    """The caption above a map."""
    weights = shown.weights[slot]
    largest, uniform = max(max(row) for row in weights), 1 / len(shown.columns)
    gate = "" if gates is None else f"gate {gates[slot]:+.3f}, "
    return f"LLM layer {layer}: {gate}largest weight {largest:.2f} (darkest; uniform attention would be {uniform:.3f})"
