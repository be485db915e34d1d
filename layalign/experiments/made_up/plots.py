"""The demo's plots, as PNG bytes."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from layalign.experiments.pages import png

_SMOOTH = 15


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
    figure = Figure(figsize=(13, 3.4))
    axes = figure.subplots(1, len(panels))
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            axis.plot(*_smoothed(losses[name]), label=name.removesuffix(f", {title}"))
        axis.set(
            title=title if title == "pre-training" else f"stage: {title}", xlabel="step", ylabel="loss (running mean)"
        )
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
    return png(figure)
