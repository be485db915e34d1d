"""The plots of a result file: bars for every baseline, the roofline, the scaling curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from layalign.experiments.bench.results import Results, rough
from layalign.experiments.pages import png
from layalign.utils.files import write_whole

COLOURS = ("#1b6ca8", "#e0772f", "#4b9b5a", "#a23b72", "#7a6c5d", "#c9a227")
WIDTH = 9.0  # inches
OPERATIONS = ("layer_mix", "layer_projection", "gated_cross_attention")


def write(results: Results, folder: Path) -> list[Path]:
    """Write the plots for which the file has rows; returns the PNG files."""
    rows = list(results.rows.values())
    written = []
    figures = {
        "model": _bars([row for row in rows if not _is_operation(row)]),
        "operations": _bars([row for row in rows if _is_operation(row)]),
        "roofline": _roofline(results, rows),
        "scaling": _scaling(rows),
    }
    for stem, figure in figures.items():
        if figure is None:
            continue
        file = folder / f"{results.path.stem}-{stem}.png"
        write_whole(file, png(figure, metadata={"Software": None}))
        written.append(file)
    return written


def _is_operation(row: dict[str, Any]) -> bool:
    return str(row["group"]).startswith(OPERATIONS)


def _bars(rows: Sequence[dict[str, Any]]) -> Any:
    """Ratios ours / baseline: a panel per group in two columns, a bar per baseline, targets as lines."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("against") and "slopes" not in row:
            groups.setdefault(row["group"], []).append(row)
    if not groups:
        return None
    names = dict.fromkeys(name for members in groups.values() for row in members for name in row["against"])
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    columns: list[dict[str, float]] = [{}, {}]
    for group, members in groups.items():  # to the shorter column
        shorter = min(columns, key=lambda column: sum(column.values()))
        shorter[group] = 0.6 + 0.16 * sum(1 + len(row["against"]) for row in members)
    columns = [column for column in columns if column]
    height = max(sum(column.values()) for column in columns)
    figure = Figure(figsize=(6.0 * len(columns), height + 0.6), layout="constrained")
    parts = figure.subfigures(1, len(columns), squeeze=False)[0]
    for part, column in zip(parts, columns, strict=True):
        empty = height - sum(column.values())
        ratios = [*column.values(), *([empty] if empty > 0.1 else [])]
        axes = part.subplots(len(ratios), 1, height_ratios=ratios, squeeze=False)[:, 0]
        for axis in axes[len(column) :]:
            axis.axis("off")
        for axis, group in zip(axes[: len(column)], column, strict=True):
            _bar_panel(axis, group, groups[group], colours)
    handles = [axes[0].barh([0], [0], color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=min(len(handles), 4), frameon=False)
    figure.suptitle(
        "ours / baseline: below 1 is better (black line: required, dotted: goal; ≈: fewer than three rounds)",
        fontsize=9,
    )
    return figure


def _bar_panel(axis: Any, group: str, rows: Sequence[dict[str, Any]], colours: dict[str, str]) -> None:
    place, ticks, labels = 0.0, [], []
    for row in rows:
        top, target = place, row.get("target") or {}
        for name, found in row["against"].items():
            ratio = found["ratio"]
            spread = [[max(ratio - found.get("ratio q1", ratio), 0)], [max(found.get("ratio q3", ratio) - ratio, 0)]]
            axis.barh(place, ratio, 0.9, color=colours[name], xerr=spread, error_kw={"elinewidth": 0.8})
            axis.annotate(f" {rough(found)}{ratio:.2f}", (max(ratio + spread[1][0], 0), place), va="center", fontsize=7)
            if name == target.get("baseline"):
                for key, style in (("must", "-"), ("aim", ":")):
                    if target.get(key) is not None:
                        axis.plot([target[key]] * 2, [place - 0.6, place + 0.6], style, color="black", linewidth=1.5)
            place += 1
        ticks.append((top + place - 1) / 2)
        labels.append(row["name"])
        place += 1
    axis.axvline(1, color="#888888", linewidth=0.8)
    axis.margins(x=0.1)  # for the numbers next to the longest bars
    axis.set_yticks(ticks, labels, fontsize=7)
    axis.tick_params(axis="x", labelsize=7)
    axis.invert_yaxis()
    axis.set_title(group, fontsize=9, loc="left")


def _roofline(results: Results, rows: Sequence[dict[str, Any]]) -> Any:
    """TFLOP/s over operations per byte, with the two ceilings measured in the same run."""
    ceilings = results.data.get("ceilings", {})
    points = [row for row in rows if row.get("flop per byte") and row.get("TFLOP/s")]
    if not points or not {"copy GB/s", "matmul TFLOP/s"} <= ceilings.keys():
        return None
    figure = Figure(figsize=(WIDTH, 5.5), layout="constrained")
    axis = figure.subplots()
    slope, roof = ceilings["copy GB/s"] / 1e3, ceilings["matmul TFLOP/s"]
    intensities = [row["flop per byte"] for row in points]
    low, high = min(*intensities, roof / slope) / 2, max(*intensities, roof / slope) * 2
    axis.plot([low, roof / slope, high], [low * slope, roof, roof], color="black", label="measured: copy, then matmul")
    groups = list(dict.fromkeys(row["group"] for row in points))
    for index, group in enumerate(groups):
        members = [row for row in points if row["group"] == group]
        axis.scatter(
            [row["flop per byte"] for row in members],
            [row["TFLOP/s"] for row in members],
            s=22,
            color=COLOURS[index % len(COLOURS)],
            marker="os^"[index // len(COLOURS) % 3],
            label=group,
        )
    axis.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s")
    axis.set_title(
        "Roofline (points above it: data in caches, zeros skipped, or a faster clock than when the line was measured)",
        fontsize=9,
        loc="left",
    )
    axis.legend(fontsize=7)
    return figure


def _scaling(rows: Sequence[dict[str, Any]]) -> Any:
    """A panel per row of the scaling group: time (left axis) and memory (right axis), both logarithmic."""
    found = [row for row in rows if row.get("points")]
    if not found:
        return None
    columns = 4
    height = -(-len(found) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * height), layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False).flat
    for axis, row in zip(axes, found, strict=False):
        memory = axis.twinx()
        sizes = row["labels"]["sizes"]
        for index, (who, values) in enumerate(row["points"].items()):
            slopes, colour = row["slopes"][who], COLOURS[index]
            text = f"{who}: t^{slopes['s']:.2f}, m^{slopes['bytes']:.2f}"
            axis.plot(sizes, values["s"], "o-", color=colour, markersize=3, label=text)
            memory.plot(sizes, [max(value, 1) for value in values["bytes"]], "s:", color=colour, markersize=3)
        for one in (axis, memory):
            one.set(xscale="log", yscale="log")
            one.tick_params(labelsize=6)
            one.minorticks_off()
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.set_title(row["name"], fontsize=7)
        axis.legend(fontsize=6, loc="upper left")
    for axis in figure.axes[:]:
        if not axis.has_data():
            axis.remove()
    figure.suptitle(
        "Scaling: seconds (solid, left) and peak bytes (dotted, right); exponents in the legends", fontsize=9
    )
    return figure
