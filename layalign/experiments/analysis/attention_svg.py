"""Attention maps as inline SVG: the browser draws the tokens, so every script it has a font for can be read."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import numpy as np

from layalign.experiments.analysis.result import AttentionMap

CELL = 16
_LABEL = 96  # room for a token's label
_LONGEST = 12  # characters of a label
_COLOURS = "Blues"


def map_svg(shown: AttentionMap, slot: int) -> str:
    """One layer's map as an `<svg>` element: rows are LLM tokens, columns source tokens, dark is much.

    Args:
        shown: the maps.
        slot: which of its layers.
    """
    weights = np.array(shown.weights[slot], dtype=np.float64)
    width, height = CELL * weights.shape[1], CELL * weights.shape[0]
    # Room on the right too: the last label leans over.
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
    """One pixel per weight, as a base64 PNG; the map's largest weight is the darkest."""
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, weights, cmap=_COLOURS, vmin=0.0, vmax=float(weights.max()) or 1.0, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def _text(label: str) -> str:
    short = label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "…"
    return html.escape(short)


def caption(shown: AttentionMap, slot: int, layer: int, gates: Sequence[float] | None) -> str:
    """What stands above a map."""
    weights = shown.weights[slot]
    largest, uniform = max(max(row) for row in weights), 1 / len(shown.columns)
    gate = "" if gates is None else f"gate {gates[slot]:+.3f}, "
    return f"LLM layer {layer}: {gate}largest weight {largest:.2f} (darkest; an even spread would be {uniform:.3f})"
