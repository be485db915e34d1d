"""Plots (PNG) and one page (report.html, with embedded images) from the result files of a folder."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layalign.experiments.bench import plots as bench_plots
from layalign.experiments.bench.results import RATES, Results, interval_text, load_folder, quantity, ratio_text
from layalign.experiments.pages import STYLE, image, items, page, paragraphs, table
from layalign.utils.files import write_whole

PAGE = "report.html"
_STYLE = """
.met { color: #0a6b2d } .missed { color: #a8201a } .warning { background: #fff3d6; padding: .5rem 1rem }
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
    file = folder / PAGE
    write_whole(file, page("layalign: benchmarks", "".join(parts), STYLE + _STYLE))
    return file


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
    return paragraphs(*lines, kind="warning")


def _section(results: Results, images: Sequence[Path]) -> str:
    """The section of one result file."""
    parts = [f"<h2>{html.escape(results.device)}</h2>", _facts(results), _targets(results)]
    parts += [image(file.read_bytes(), file.stem) for file in images]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in results.rows.values():
        groups.setdefault(row["group"], []).append(row)
    parts += [f"<h3>{html.escape(name)}</h3>{_group(rows)}" for name, rows in groups.items()]
    left = results.data.get("left out", {})
    if left:
        parts.append("<h3>Not measured here</h3>" + items(f"{what}: {why}" for what, why in left.items()))
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
    return table(("", ""), [(name, str(value)) for name, value in lines.items()])


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
    return "<h3>Targets</h3>" + table(head, rows, marked=True)


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
        lines.append([*cells, "" if clock is None else f"{clock:.0f}"])
    return table(head, lines)
