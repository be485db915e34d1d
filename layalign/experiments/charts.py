"""Charts as inline SVG that use the page's colours and fonts, and so follow its dark mode."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 640, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 40


@dataclass(frozen=True)
class Line:
    """A curve: its name, its points (x, y), the CSS class of its colour (`c1` to `c4`), dashed or not."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    dashed: bool = False


def legend(entries: Sequence[tuple[str, str, bool]]) -> str:
    """A legend; each entry is (name, CSS class of the colour, dashed)."""
    items = (
        f'<li><svg width="26" height="10"><line x1="1" y1="5" x2="25" y2="5" class="line {colour}'
        f'{" dashed" if dashed else ""}"/></svg>{html.escape(name)}</li>'
        for name, colour, dashed in entries
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def line_chart(lines: Sequence[Line], x_label: str, y_label: str, *, low: float | None = None) -> str:
    """Curves over one pair of axes, with a legend above.

    Args:
        lines: the curves; at least one point in total.
        x_label, y_label: labels of the axes.
        low: start of the y axis; None is below the lowest point.
    """
    points = [point for line in lines for point in line.points]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    bottom = min(ys) if low is None else low
    ticks = _ticks(bottom, max(ys))
    spans = (min(xs), max(max(xs), min(xs) + 1)), (min(bottom, ticks[0]), max(max(ys), ticks[-1], bottom + 1e-9))

    def place(x: float, y: float) -> tuple[float, float]:
        return _at(x, spans[0], _LEFT, WIDTH - _RIGHT), _at(y, spans[1], HEIGHT - _BOTTOM, _TOP)

    parts = []
    for tick in ticks:
        y = place(0, tick)[1]
        parts.append(f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(_label(_LEFT - 6, y + 4, f"{tick:g}", "end"))
    for tick in _ticks(*spans[0], most=8):
        if spans[0][0] <= tick <= spans[0][1] and tick == int(tick):
            parts.append(_label(place(tick, 0)[0], HEIGHT - _BOTTOM + 16, f"{tick:g}", "middle"))
    for line in lines:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line.points))
        parts.append(f'<polyline points="{path}" class="line {line.colour}{" dashed" if line.dashed else ""}"/>')
        if len(line.points) < 16:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" class="dot {line.colour}"/>'
                for x, y in (place(*point) for point in line.points)
            ]
    parts += _axis_names(x_label, y_label, WIDTH, HEIGHT)
    return legend([(line.name, line.colour, line.dashed) for line in lines]) + _svg(WIDTH, HEIGHT, parts, y_label)


def bar_chart(values: Sequence[float], labels: Sequence[str], x_label: str, y_label: str) -> str:
    """A bar for each value, upwards or downwards from 0."""
    ticks = _ticks(min(0.0, *values), max(0.0, *values))
    span = min(0.0, *values, ticks[0]), max(0.0, *values, ticks[-1], 1e-9)
    step = (WIDTH - _LEFT - _RIGHT) / len(values)

    def height(value: float) -> float:
        return _at(value, span, HEIGHT - _BOTTOM, _TOP)

    parts = []
    for tick in ticks:
        parts.append(
            f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{height(tick):.1f}" y2="{height(tick):.1f}" class="grid"/>'
        )
        parts.append(_label(_LEFT - 6, height(tick) + 4, f"{tick:g}", "end"))
    every = max(1, math.ceil(len(values) / 16))
    for i, (value, label) in enumerate(zip(values, labels, strict=True)):
        x, top, base = _LEFT + step * i, min(height(value), height(0)), height(0)
        size = max(abs(height(value) - base), 0.5)
        title = f"<title>{html.escape(label)}: {value:+.3f}</title>"
        bar = f'x="{x + 0.15 * step:.1f}" y="{top:.1f}" width="{0.7 * step:.1f}" height="{size:.1f}"'
        parts.append(f'<rect {bar} rx="1.5" class="fill {"c1" if value >= 0 else "c2"}">{title}</rect>')
        if i % every == 0:
            parts.append(_label(x + step / 2, HEIGHT - _BOTTOM + 16, label, "middle"))
    parts.append(f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{height(0):.1f}" y2="{height(0):.1f}" class="axis"/>')
    parts += _axis_names(x_label, y_label, WIDTH, HEIGHT)
    return _svg(WIDTH, HEIGHT, parts, y_label)


def heat_map(
    rows: Sequence[Sequence[float]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    cell: tuple[int, int],
    limit: float,
    names: tuple[str, str] | None = None,
    slanted: bool = False,
    picture: bytes | None = None,
) -> str:
    """A cell for each number. The opacity shows its size, the colour its sign.

    Args:
        rows: the numbers.
        row_labels, column_labels: labels of the rows and columns; of long ones only the start is shown.
        cell: width and height of a cell.
        limit: the size with full opacity.
        names: names of the columns' and of the rows' axis.
        slanted: whether column labels are rotated, for words instead of numbers.
        picture: a PNG with a pixel for each number, which takes less space than a cell for each.
    """
    wide, high = cell
    row_labels, column_labels = ([_short(label) for label in labels] for labels in (row_labels, column_labels))
    left = 12 + (18 if names else 0) + round(6.6 * max(len(label) for label in row_labels))
    top = 20 + (round(5.4 * max(len(label) for label in column_labels)) if slanted else 6)
    width = left + wide * len(column_labels) + (52 if slanted else 4)
    height = top + high * len(rows) + (22 if names else 2)
    parts = []
    for i, (label, row) in enumerate(zip(row_labels, rows, strict=True)):
        parts.append(_label(left - 5, top + high * i + high / 2 + 4, label, "end"))
        for j, value in enumerate(row if picture is None else ()):
            strength = min(1.0, abs(value) / limit) if limit else 0.0
            title = f"<title>{html.escape(label)}, {html.escape(column_labels[j])}: {value:.3f}</title>"
            box = f'x="{left + wide * j}" y="{top + high * i}" width="{wide - 1}" height="{high - 1}"'
            colour = "c1" if value >= 0 else "c2"
            parts.append(
                f'<rect {box} class="fill {colour}" fill-opacity="{0.04 + 0.96 * strength:.2f}">{title}</rect>'
            )
    if picture is not None:
        box = f'x="{left}" y="{top}" width="{wide * len(column_labels)}" height="{high * len(rows)}"'
        source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        parts.append(
            f'<image {box} preserveAspectRatio="none" style="image-rendering: pixelated" href="{source}"/>'
            f'<rect {box} fill="none" stroke="#bbb"/>'
        )
    for j, label in enumerate(column_labels):
        middle, above = left + wide * j + wide / 2, top - 5
        turn = f' transform="rotate(-50 {middle} {above})"' if slanted else ""
        parts.append(_label(middle, above, label, "start" if slanted else "middle", turn))
    if names:
        parts.append(_label(left + wide * len(column_labels) / 2, height - 5, names[0], "middle"))
        x, y = 12, top + high * len(rows) / 2
        parts.append(_label(x, y, names[1], "middle", f' transform="rotate(-90 {x} {y})"'))
    return _svg(width, height, parts, "heat map", natural=True)


def _short(label: str) -> str:
    """A label of at most 12 characters."""
    return label if len(label) <= 12 else label[:11] + "…"


def _svg(width: int, height: int, parts: Sequence[str], name: str, natural: bool = False) -> str:
    size = f'width="{width}" height="{height}" ' if natural else 'class="wide" '
    return (
        f'<div class="chart"><svg {size}viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(name)}">'
        f"{''.join(parts)}</svg></div>"
    )


def _label(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{html.escape(text)}</text>'


def _axis_names(x_label: str, y_label: str, width: int, height: int) -> list[str]:
    x, y = 13, (height - _BOTTOM + _TOP) / 2
    return [
        _label((width + _LEFT - _RIGHT) / 2, height - 6, x_label, "middle"),
        _label(x, y, y_label, "middle", f' transform="rotate(-90 {x} {y})"'),
    ]


def _at(value: float, span: tuple[float, float], start: float, end: float) -> float:
    return start + (end - start) * (value - span[0]) / ((span[1] - span[0]) or 1.0)


def _ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from at most ``low`` up to ``high``, about ``most`` of them."""
    size = (high - low) or 1.0
    raw = size / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first = math.floor(low / step)
    return [round((first + i) * step, 10) for i in range(math.floor((high - first * step) / step + 1e-9) + 1)]
