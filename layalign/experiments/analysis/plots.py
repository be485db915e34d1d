"""The plots, as PNG bytes. Labels are layer numbers and English names, which matplotlib's default font covers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from layalign.experiments.analysis.result import METRICS, AnalysisResult
from layalign.experiments.pages import png

_MARKERS = "ovsDP^<>Xp"
_ENGLISH = "English"
_FEW = 12  # most layers for a legend, or for markers side by side
_CELLS = 130  # most cells of a heat map for numbers in them
_WIDE = "LLM hidden state (0: embeddings)"


def _ticks(labels: Sequence[Any], most: int = 18) -> tuple[list[int], list[str]]:
    """Positions and texts of axis labels, thinned out so that they do not overlap."""
    step = max(1, math.ceil(len(labels) / most))
    return list(range(0, len(labels), step)), [str(label) for label in labels[::step]]


def _heat(
    axis: Any, rows: Sequence[Sequence[float]], labels: Sequence[Any], columns: Sequence[Any], span: tuple[float, float]
) -> Any:
    """One heat map; a span symmetric around 0 gets a colour scale whose middle is white."""
    centred = span[0] == -span[1]
    image = axis.imshow(
        rows, cmap="RdBu_r" if centred else "viridis", vmin=span[0], vmax=span[1], aspect="auto", interpolation="none"
    )
    axis.set_xticks(*_ticks(columns))
    axis.set_yticks(*_ticks(labels, 30))
    if len(rows) * len(columns) <= _CELLS:
        for i, row in enumerate(rows):
            for j, number in enumerate(row):
                share = (number - span[0]) / (span[1] - span[0])
                dark = abs(share - 0.5) > 0.35 if centred else share < 0.55
                color = "white" if dark else "black"
                axis.text(j, i, f"{number:.2f}", ha="center", va="center", fontsize=7, color=color)
    return image


def mix_picture(mix: Mapping[str, Sequence[Sequence[float]]], layers: Sequence[int], columns: Sequence[int]) -> bytes:
    """Mix weights of keys and of values, on one colour scale centred on 0.

    Args:
        mix: weights (L, E) under "keys" and "values".
        layers, columns: the L LLM layers and the E encoder layers.
    """
    limit = max((abs(w) for rows in mix.values() for row in rows for w in row), default=0.0) or 1.0
    size = (min(15, 3.5 + 0.8 * len(columns)), min(9, 1.6 + 0.3 * len(layers)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (name, rows) in zip(axes, mix.items(), strict=True):
        image = _heat(axis, rows, layers, columns, (-limit, limit))
        axis.set(title=f"mix weights of the {name}", xlabel="encoder layer (0: embeddings)")
    axes[0].set_ylabel("LLM layer")
    figure.colorbar(image, ax=axes, label="weight")
    return png(figure)


def gate_picture(
    gates: Sequence[float], layers: Sequence[int], history: Sequence[Mapping[str, Any]] | None = None
) -> bytes:
    """Gates per LLM layer and, where recorded, over training."""
    figure = Figure(figsize=(11 if history else 6, 3.2), layout="constrained")
    axes: Any = figure.subplots(1, 2 if history else 1, squeeze=False)[0]
    axes[0].bar(range(len(layers)), gates)
    axes[0].axhline(0, color="black", linewidth=0.8)
    axes[0].set(title="gates", xlabel="LLM layer", ylabel="gate")
    axes[0].set_xticks(*_ticks(layers, 12))
    if history:
        _gate_lines(axes[1], layers, history)
        axes[1].axhline(0, color="black", linewidth=0.8)
        axes[1].set(title="gates over training", xlabel="training step")
        axes[1].grid(alpha=0.3)
    return png(figure)


def _gate_lines(axis: Any, layers: Sequence[int], history: Sequence[Mapping[str, Any]]) -> None:
    """A line per layer, from dark (first) to light, with a legend or, for many layers, a colour bar."""
    colors = colormaps["viridis"]
    for slot, layer in enumerate(layers):
        steps, values = [entry["step"] for entry in history], [entry["gates"][slot] for entry in history]
        marker = "o" if len(history) < 3 else None
        axis.plot(steps, values, color=colors(slot / max(1, len(layers) - 1)), label=str(layer), marker=marker)
    if len(layers) <= _FEW:
        axis.legend(title="LLM layer", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        return
    scale = ScalarMappable(Normalize(0, len(layers) - 1), colors)
    bar = axis.figure.colorbar(scale, ax=axis, label="LLM layer")
    places, names = _ticks(layers, 12)
    bar.set_ticks(places, labels=names)


def contribution_picture(result: AnalysisResult) -> bytes:
    """Mean contribution norms per layer as bars; languages as markers, or for a deep model as rows of a heat map."""
    assert result.contribution is not None
    deep = len(result.language_layers) > _FEW
    languages, places = list(result.sentences), range(len(result.language_layers))
    figure = Figure(figsize=(9, 3.6 + 0.24 * len(languages) if deep else 3.4), layout="constrained")
    axes: Any = figure.subplots(
        2 if deep else 1, 1, squeeze=False, sharex=True, height_ratios=[8, 2 + len(languages)] if deep else None
    )[:, 0]
    axes[0].bar(places, result.contribution["mean"], color="#7d96bd" if deep else "#c8d3e5", label="mean")
    axes[0].set(ylabel="contribution norm", title="||gated term|| / ||self-attention||")
    axes[0].grid(axis="y", alpha=0.3)
    axes[-1].set(xlabel="LLM layer")
    if deep:
        rows = [result.contribution[language] for language in languages]
        highest = max(max(max(row) for row in rows), 1e-6)
        image = _heat(axes[1], rows, languages, result.language_layers, (0.0, highest))
        figure.colorbar(image, ax=axes[1], label="contribution norm")
        return png(figure)
    for i, (language, style) in enumerate(_styles(languages).items()):
        offset = (i + 0.5) / len(languages) - 0.5  # side by side, so that equal numbers do not hide each other
        shifted = [place + 0.7 * offset for place in places]
        axes[0].scatter(shifted, result.contribution[language], s=22, label=language, zorder=3, **style)
    axes[0].set_xticks(*_ticks(result.language_layers))
    _legend_outside(axes[0], len(languages) + 1)
    return png(figure)


def similarity_picture(result: AnalysisResult) -> bytes:
    """Each metric per layer and view: the mean over the languages, and their range."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True).flat
    for axis, (metric, title) in zip(panels, METRICS.items(), strict=True):
        for index, (view, found) in enumerate(result.similarity.items()):
            rows = list(zip(*(getattr(each, metric) for each in found.values()), strict=True))
            layers, color = range(len(rows)), f"C{index}"
            axis.plot(layers, result.averages(view, metric), color=color, label=view, marker="o", markersize=3)
            axis.fill_between(layers, [min(r) for r in rows], [max(r) for r in rows], color=color, alpha=0.09)
            if metric == "cka":
                axis.plot(layers, result.averages(view, "shuffled_cka"), color=color, linestyle=":")
        if "retrieval" in title:
            chance = sum(1 / count for count in result.sentences.values()) / len(result.sentences)
            axis.axhline(chance, color="gray", linestyle=":")
        axis.axhline(0, color="black", linewidth=0.6)
        # Not always up to 1: the numbers of a weak model would not be visible.
        axis.set(title=title, ylim=(None, min(1.05, max(0.1, axis.get_ylim()[1]))))
        axis.set_xticks(*_ticks(range(len(rows))))
        axis.grid(alpha=0.3)
    for axis in figure.axes[2:]:
        axis.set_xlabel(_WIDE)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return png(figure)


def language_picture(result: AnalysisResult, metric: str) -> bytes:
    """One metric as heat maps, languages by layers, one per view."""
    views, languages = result.similarity, list(result.sentences)
    layers = range(len(next(iter(next(iter(views.values())).values())).cosine))
    size = (2 + len(views) * min(6, 1.5 + 0.45 * len(layers)), 1.6 + 0.28 * len(languages))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(views), sharey=True, squeeze=False)[0]
    highest = max(abs(n) for found in views.values() for each in found.values() for n in getattr(each, metric))
    highest = max(highest, 0.1)
    span = (-highest if metric == "cosine" else 0.0, highest)
    for axis, (view, found) in zip(axes, views.items(), strict=True):
        rows = [getattr(found[language], metric) for language in languages]
        image = _heat(axis, rows, languages, layers, span)
        axis.set(title=view, xlabel="LLM hidden state")
    figure.colorbar(image, ax=list(axes), label=METRICS[metric])
    return png(figure)


def projection_picture(result: AnalysisResult, kind: str) -> bytes:
    """The projection `kind`, "pca" or "tsne": one panel per view, English in black on top."""
    views = result.projections
    figure = Figure(figsize=(1.5 + 4.6 * len(views), 4.6), layout="constrained")
    axes = figure.subplots(1, len(views), squeeze=False)[0]
    for axis, (view, found) in zip(axes, views.items(), strict=True):
        points: Mapping[str, list[list[float]]] = getattr(found, kind)
        styles = _styles([name for name in points if name != _ENGLISH])
        styles[_ENGLISH] = {"color": "black", "marker": "*"}
        for language, rows in points.items():
            xs, ys = zip(*rows, strict=True)
            size = 26 if language == _ENGLISH else 14
            axis.scatter(xs, ys, s=size, alpha=0.65, linewidths=0, label=language, **styles[language])
        axis.set(title=view)
        if kind == "pca":
            shares = [*found.explained, 0.0, 0.0]
            axis.set(xlabel=f"first axis ({shares[0]:.0%} of the variance)", ylabel=f"second axis ({shares[1]:.0%})")
        else:
            axis.set(xticks=[], yticks=[])
    _legend_outside(axes[-1], len(result.sentences) + 1)
    return png(figure)


def _styles(languages: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each language; unique for up to a hundred languages."""
    return {
        language: {"color": f"C{i % 10}", "marker": _MARKERS[(i + i // 10) % len(_MARKERS)]}
        for i, language in enumerate(languages)
    }


def _legend_outside(axis: Any, entries: int) -> None:
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, ncols=1 + (entries - 1) // 16)
