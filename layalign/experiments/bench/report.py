"""Plots (PNG) and one page (report.html, with embedded images) from the result files of a folder."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layalign.experiments.bench import plots as bench_plots
from layalign.experiments.bench.results import RATES, Results, interval_text, load_folder, quantity, ratio_text
from layalign.utils.files import write_whole

PAGE = "report.html"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: right; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
.met { color: #0a6b2d; } .missed { color: #a8201a; } .warning { background: #fff3d6; padding: .5rem 1rem; }
img { max-width: 100%; } figure { margin: 1.5rem 0; }
"""


def write_report(folder: Path) -> Path:
    """Write the plots and the page into ``folder``, which holds the result files.

    Returns:
        The page.

    Raises:
        ArgumentError: the folder has no result file, or one that cannot be read.
    """
    found = load_folder(folder)
    parts = [f"<h1>Benchmarks of layalign</h1>{_scope(found)}"]
    for results in found:
        images = bench_plots.write(results, folder)
        parts.append(_section(results, images))
    title = "layalign: benchmarks"
    text = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    page = folder / PAGE
    write_whole(page, f"{text}</head><body>{''.join(parts)}</body></html>\n")
    return page


def _scope(found: Sequence[Results]) -> str:
    """Warnings about the limits of the results."""
    lines = []
    if not any(results.gpu for results in found):
        lines.append("No GPU results: nothing on this page was measured on a GPU or says anything about one.")
    if any(results.data["shapes"] == "quick" for results in found):
        lines.append("The quick shapes are a smoke test: their numbers mean nothing.")
    for results in found:
        if results.data["facts"].get("changed files"):
            lines.append(f"{results.path.name}: measured with uncommitted changes.")
        for failure in results.data.get("failed", ()):
            lines.append(f"{results.path.name}: failed and not measured: {failure}")
    return "".join(f'<p class="warning">{html.escape(line)}</p>' for line in lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; the cells are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _section(results: Results, images: Sequence[Path]) -> str:
    """The section of one result file."""
    parts = [f"<h2>{html.escape(results.device)}</h2>", _facts(results), _targets(results)]
    for image in images:
        data = base64.b64encode(image.read_bytes()).decode("ascii")
        parts.append(f'<figure><img alt="{html.escape(image.stem)}" src="data:image/png;base64,{data}"></figure>')
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in results.rows.values():
        groups.setdefault(row["group"], []).append(row)
    parts += [f"<h3>{html.escape(name)}</h3>{_group(rows)}" for name, rows in groups.items()]
    left = results.data.get("left out", {})
    if left:
        items = "".join(f"<li>{html.escape(what)}: {html.escape(str(why))}</li>" for what, why in left.items())
        parts.append(f"<h3>Not measured here</h3><ul>{items}</ul>")
    return "".join(parts)


def _facts(results: Results) -> str:
    data = results.data
    facts = data["facts"]
    lines = {
        "commit": results.commit,
        "shapes": results.shapes,
        "python": facts.get("python", "unknown"),
        **facts.get("versions", {}),
        **{f"device, {name}": value for name, value in facts["device"].items()},
        **{f"measured ceiling, {name}": f"{value:.4g}" for name, value in data.get("ceilings", {}).items()},
        "seconds of the whole run": data.get("seconds", "unknown"),
    }
    return _table(("", ""), [(html.escape(name), html.escape(str(value))) for name, value in lines.items()])


def _targets(results: Results) -> str:
    """A table of the ratios that are required, and whether they are reached."""
    rows = []
    for row in results.rows.values():
        target = row.get("target")
        if not target:
            continue
        found = row.get("against", {}).get(target["baseline"])
        if found is None:
            rows.append((html.escape(row["id"]), html.escape(target["baseline"]), "not measured", "", "", "", ""))
            continue
        ratio, must, aim = found["ratio"], target["must"], target.get("aim")
        met = '<span class="met">yes</span>' if ratio <= must else '<span class="missed">no</span>'
        cells = ratio_text(found), interval_text(found), f"{must:.3f}", "" if aim is None else f"{aim:.3f}", met
        rows.append((html.escape(row["id"]), html.escape(target["baseline"]), *cells))
    if not rows:
        return ""
    head = "row", "baseline", "ours / baseline", "95 % interval", "must", "aim", "reached"
    return "<h3>Targets</h3>" + _table(head, rows)


def _ratio(found: dict[str, Any]) -> str:
    """The ratio, with its quartiles if there are any."""
    spread = [found[key] for key in ("ratio q1", "ratio q3") if key in found]
    return ratio_text(found) + (f" ({spread[0]:.3f} to {spread[1]:.3f})" if len(spread) == 2 else "")


def _group(rows: Sequence[dict[str, Any]]) -> str:
    """The table of a group: a line per row, a column per baseline."""
    names = list(dict.fromkeys(name for row in rows for name in row.get("against", {})))
    rates = [key for key in RATES if any(key in row for row in rows)]
    slopes = any("slopes" in row for row in rows)
    head = ["", "median", "IQR", "rounds", *(f"ours / {name}" for name in names), *rates]
    head += ["time ~ size^", "memory ~ size^"] if slopes else []
    head.append("clock MHz")
    lines = []
    for row in rows:
        against = row.get("against", {})
        cells = [row["name"], quantity(row["median"], row["unit"]), quantity(row["q3"] - row["q1"], row["unit"])]
        cells.append(str(row.get("rounds", "")))
        cells += [_ratio(against[name]) if name in against else "" for name in names]
        cells += [f"{row[key]:.3g}" if key in row else "" for key in rates]
        if slopes:
            own = row.get("slopes", {}).get("layalign", {})
            cells += [f"{own[unit]:.2f}" if unit in own else "" for unit in ("s", "bytes")]
        clock = row.get("clock MHz")
        lines.append([html.escape(cell) for cell in (*cells, "" if clock is None else f"{clock:.0f}")])
    return _table([html.escape(cell) for cell in head], lines)
