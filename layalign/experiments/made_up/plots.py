"""The demo's plots, as PNG bytes."""

from __future__ import annotations

import io
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

_SMOOTH = 15


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def _smoothed(points: list[Any]) -> tuple[list[int], list[float]]:
    """Steps, and losses averaged over the last few points."""
    steps, values = [int(step) for step, _ in points], [float(loss) for _, loss in points]
    means = [
        sum(values[max(0, i - _SMOOTH + 1) : i + 1]) / len(values[max(0, i - _SMOOTH + 1) : i + 1])
        for i in range(len(values))
    ]
    return steps, means


def loss_curves(losses: dict[str, list[Any]]) -> bytes:
    """One panel for pre-training, and one with both systems for each LayAlign stage."""
    panels: dict[str, list[str]] = {"pre-training": [], "translation": [], "task": []}
    for name in losses:
        panels[next((panel for panel in panels if name.endswith(panel)), "pre-training")].append(name)
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 3.4))
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            axis.plot(*_smoothed(losses[name]), label=name.removesuffix(f", {title}"))
        axis.set(
            title=title if title == "pre-training" else f"stage: {title}", xlabel="step", ylabel="loss (running mean)"
        )
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
    return _png(figure)


def gate_picture(gates: list[float]) -> bytes:
    """The gate of every LLM layer."""
    figure, axis = plt.subplots(figsize=(5, 2.8))
    axis.bar(range(len(gates)), gates)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(title="gates after training (0 at the start)", xlabel="LLM layer", ylabel="gate", xticks=range(len(gates)))
    return _png(figure)


def mix_picture(weights: list[list[float]], encoder_layers: list[int]) -> bytes:
    """The aligner's mix weights for keys and values: a row per LLM layer, a column per encoder layer."""
    limit = max(abs(weight) for row in weights for weight in row) or 1.0
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2))
    image = None
    for axis, name, rows in zip(axes, ("keys", "values"), (weights[0::2], weights[1::2]), strict=True):
        image = axis.imshow(rows, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        axis.set(title=f"mix weights for {name}", xlabel="encoder layer", ylabel="LLM layer")
        axis.set_xticks(range(len(encoder_layers)), [str(layer) for layer in encoder_layers])
        axis.set_yticks(range(len(rows)))
        for i, row in enumerate(rows):
            for j, weight in enumerate(row):
                color = "white" if abs(weight) > 0.7 * limit else "black"
                axis.text(j, i, f"{weight:.2f}", ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(image, ax=axes)
    return _png(figure)
