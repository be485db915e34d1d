"""The experiment's tables and plots, made from `results.json` only."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from layalign.experiments import pages
from layalign.experiments.controlled.results import GROUPS
from layalign.utils.files import write_whole
from layalign.utils.pages import replaced
from layalign.utils.reading import read_json

PAGE = "report.html"
_COLUMNS = ("all", "high", "medium", "low", "trained", "unseen", "English")


def _pm(cell: dict[str, Any]) -> str:
    """Mean ± half of its interval, or only the mean for a single seed."""
    return f"{cell['mean']:.1f}" + (f" ± {cell['half']:.1f}" if cell["half"] is not None else "")


def _first(found: dict[str, Any]) -> str:
    return found["settings"]["systems"][0]["name"]


def accuracy_rows(found: dict[str, Any]) -> list[list[str]]:
    """Header, then a row per system: mean accuracy and its interval, by group of languages."""
    groups = [group for group in _COLUMNS if found["groups"][group]]
    rows = [["system", "seeds", *groups]]
    for system in found["systems"].values():
        cells = [_pm(system["groups"][group]) for group in groups]
        rows.append([system["label"], str(len(system["seeds"])), *cells])
    return rows


def headline(found: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """Title and rows of the main table."""
    return "accuracy %, mean over seeds ± 95% interval", accuracy_rows(found)


def test_rows(found: dict[str, Any]) -> list[list[str]]:
    """Header, then a row per system except the first: difference to the first, its interval, corrected p-value."""
    first = _first(found)
    groups = [group for group in ("all", "low", "trained", "unseen") if found["groups"][group]]
    rows = [["system", *(part for group in groups for part in (f"{group}: difference", "p"))]]
    for name, system in found["systems"].items():
        tests = [system["groups"][group].get(f"against {first}") for group in groups]
        if name == first or not all(tests):
            continue
        cells = []
        for test in tests:
            half = "" if test["half"] is None else f" ± {test['half']:.1f}"
            cells += [f"{test['difference']:+.1f}{half}", "-" if test["p_holm"] is None else _p(test["p_holm"])]
        rows.append([system["label"], *cells])
    return rows


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def cost_rows(found: dict[str, Any]) -> list[list[str]]:
    """Header, then a row per system: trained parameters, steps and seconds."""
    rows = [["system", "trained parameters", "steps: translation", "steps: task", "training seconds"]]
    for system in found["systems"].values():
        steps = [str(system["train_steps"].get(stage, 0)) for stage in ("translation", "task")]
        parameters = " or ".join(f"{number:,}" for number in system["trained_parameters"])
        rows.append([system["label"], parameters, *steps, f"{system['train_seconds']:.0f}"])
    return rows


def language_rows(found: dict[str, Any]) -> list[list[str]]:
    """Header, then a row per language: every system's mean accuracy (`results.json` has the intervals)."""
    settings = found["settings"]
    rows = [["language", "level", "in training", *(system["label"] for system in found["systems"].values())]]
    for language in found["groups"]["all"]:
        level = next(name for name, names in settings["languages"].items() if language in names)
        trained = "yes" if language in found["groups"]["trained"] else "no"
        cells = [f"{system['languages'][language]['mean']:.1f}" for system in found["systems"].values()]
        rows.append([language, level, trained, *cells])
    return rows


def notes(found: dict[str, Any]) -> list[str]:
    """Sentences that explain the numbers."""
    settings = found["settings"]
    shares = ", ".join(f"{level} {share:g}" for level, share in settings["encoder_share"].items())
    lines = [
        f"{settings['questions']} {settings['split']} questions per language; means over seeds with 95% intervals "
        "(Student's t). Each seed has its own data, LLM, encoder and training.",
        "; ".join(f"{name}: {what}" for name, what in GROUPS.items() if found["groups"][name]) + ".",
        f"Share of a language in the encoder's pre-training: {shares}. "
        f"Unseen: {', '.join(settings['unseen']) or 'none'}.",
        f"Tests: paired over seeds against {found['systems'].get(_first(found), {}).get('label', _first(found))}, "
        "two-sided t, p-values corrected over the systems by Holm's method.",
    ]
    if found["missing"]:
        lines.append(f"Not run yet ({len(found['missing'])}): {'; '.join(found['missing'])}.")
    return lines


TABLES = {
    "accuracy": ("Accuracy (%)", accuracy_rows),
    "tests": ("Differences", test_rows),
    "cost": ("What was trained", cost_rows),
    "languages": ("By language", language_rows),
}


def picture(found: dict[str, Any]) -> bytes:
    """PNG with the mean accuracy of each system, over all languages and by level, with intervals."""
    groups = [group for group in ("all", "high", "medium", "low", "unseen") if found["groups"][group]]
    systems = list(found["systems"].values())
    figure = Figure(figsize=(11, 0.36 * len(systems) + 1.6), layout="constrained")
    axes = figure.subplots(1, len(groups), sharey=True)
    for axis, group in zip(axes if len(groups) > 1 else [axes], groups, strict=True):
        cells = [system["groups"][group] for system in systems]
        places = range(len(systems))
        colours = ["#c44e52" if place == 0 else "#4c72b0" for place in places]
        axis.barh(places, [cell["mean"] for cell in cells], color=colours, height=0.7)
        halves = [cell["half"] or 0 for cell in cells]
        axis.errorbar([c["mean"] for c in cells], list(places), xerr=halves, fmt="none", ecolor="#222222", capsize=2)
        axis.axvline(cells[0]["mean"], color="#c44e52", linewidth=0.8, linestyle=":")
        axis.set_title(GROUPS[group] if group not in ("unseen", "all") else group, fontsize=10)
        axis.set_xlim(0, 100)
        axis.set_xlabel("accuracy %", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    first = axes[0] if len(groups) > 1 else axes
    first.set_yticks(list(range(len(systems))), [system["label"] for system in systems], fontsize=9)
    first.invert_yaxis()
    return pages.png(figure, dpi=130, bbox_inches=None)


def write_report(folder: Path, found: dict[str, Any]) -> None:
    """Write `report.html` (self-contained), `report.md` and `accuracy.png` into a folder."""
    image = picture(found)
    write_whole(folder / "accuracy.png", image)
    report = pages.Report(folder, "Controlled experiment")
    report.items(notes(found))
    report.picture("accuracy", "accuracy", image)
    for title, rows in TABLES.values():
        report.heading(title)
        report.table(rows(found))
    report.write()


def written_into(page: str, found: dict[str, Any]) -> str:
    """``page`` with each table between its markers (`<!-- experiment: NAME -->`, `<!-- end -->`) replaced."""
    for name, (_, rows) in TABLES.items():
        begin = f"<!-- experiment: {name} -->"
        if begin in page:
            page = replaced(page, begin, "<!-- end -->", pages.markdown_table(rows(found)))
    return page


def main() -> None:
    """Write the tables of a result file into a page: ``RESULTS.json PAGE``."""
    results, page = (Path(argument) for argument in sys.argv[1:3])
    found = read_json(results)
    page.write_text(written_into(page.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main()
