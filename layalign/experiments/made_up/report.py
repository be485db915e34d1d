"""The demo's report: `report.html` (self-contained) and `report.md` (with PNG files)."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

from layalign.experiments.made_up.pipeline import SYSTEMS, table_rows
from layalign.experiments.made_up.plots import gate_picture, loss_curves, mix_picture
from layalign.experiments.made_up.problems import generate_problems
from layalign.utils.files import write_whole

_STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd }
td:not(:first-child), th:not(:first-child) { text-align: right } tr.average { font-weight: 600 }
img { max-width: 100% }"""


def write_report(folder: Path, found: dict[str, Any]) -> None:
    """Write both files, and the plots as PNG files for the Markdown one.

    Args:
        folder: the demo's folder.
        found: the content of `results.json`.
    """
    pictures = {
        "losses": ("Loss curves", loss_curves(found["losses"])),
        "gates": ("Gates per LLM layer", gate_picture(found["gates"])),
        "mix": ("Layer mix of the aligner", mix_picture(found["mix_weights"], found["encoder_layers"])),
    }
    for name, (_, data) in pictures.items():
        write_whole(folder / f"{name}.png", data)
    write_whole(folder / "report.md", _markdown(found, pictures))
    write_whole(folder / "report.html", _html(found, pictures))


def _setting_lines(found: dict[str, Any]) -> list[str]:
    """Sentences that describe the run."""
    settings = found["settings"]
    llm, encoder = settings["llm"], settings["encoder"]
    steps = {stage: settings[stage]["steps"] for stage in ("translation", "task")}
    share = f"{settings['low_resource_share']:g}"
    return [
        f"LLM: Llama, {settings['llm_layers']} layers x {settings['llm_size']}, English only, "
        f"{llm['steps']} steps of {llm['batch']} texts.",
        f"Encoder: M2M100, {settings['encoder_layers']} layers x {settings['encoder_size']}, all languages, "
        f"{encoder['steps']} steps of {encoder['batch']} texts; a low-resource language {share} times as often.",
        f"LayAlign trains {found['trained_parameters']:,} parameters; {found['frozen_parameters']:,} are frozen. "
        f"Both trained systems take {steps['translation']} translation steps of {settings['translation']['batch']} "
        f"examples and {steps['task']} task steps of {settings['task']['batch']}.",
        "Translation stage: every language but English, equal shares. Task stage: "
        f"{', '.join(settings['task_languages'])}. Held out of the task stage: {', '.join(found['held_out_of_task'])}.",
        f"Evaluated: {settings['problems_per_language']} {settings['split']} problems per language, the same in each. "
        "None of their combinations of template, numbers and names is in any training text. An answer is right if its "
        "last number is.",
        f"Seed {found['seed']}; Python {found['versions']['python']}, torch {found['versions']['torch']}, "
        f"transformers {found['versions']['transformers']}.",
    ]


def _examples(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The first test problem in every language."""
    split, seed = found["settings"]["split"], found["seed"]
    return [(name, generate_problems(split, 1, name, seed)[0].question) for name in found["languages"]]


def _header() -> list[str]:
    return ["language", *SYSTEMS.values()]


def _legend() -> str:
    return "* low-resource: little text in the encoder's pre-training. + not in the task stage."


def _markdown(found: dict[str, Any], pictures: dict[str, tuple[str, bytes]]) -> str:
    lines = ["# LayAlign demo", "", *(f"- {line}" for line in _setting_lines(found)), "", "## Accuracy (%)", ""]
    lines.append("| " + " | ".join(_header()) + " |")
    lines.append("|---" + "|---:" * len(SYSTEMS) + "|")
    lines += ["| " + " | ".join(cell.replace("*", "\\*") for cell in row) + " |" for row in table_rows(found)]
    lines += ["", _legend().replace("*", "\\*"), ""]
    for name, (title, _) in pictures.items():
        lines += [f"## {title}", "", f"![{title}]({name}.png)", ""]
    lines += ["## One problem in every language", "", *(f"- {name}: {text}" for name, text in _examples(found)), ""]
    lines += ["## Time", "", "| phase | seconds |", "|---|---:|"]
    lines += [f"| {name} | {seconds:.1f} |" for name, seconds in found["seconds"].items()]
    return "\n".join(lines) + "\n"


def _html_table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = []
    for row in rows:
        kind = ' class="average"' if row[0].startswith("average") else ""
        body.append(f"<tr{kind}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _html(found: dict[str, Any], pictures: dict[str, tuple[str, bytes]]) -> str:
    settings = "".join(f"<li>{html.escape(line)}</li>" for line in _setting_lines(found))
    images = "".join(
        f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        for title, data in pictures.values()
    )
    examples = "".join(f"<li>{name}: {html.escape(text)}</li>" for name, text in _examples(found))
    times = _html_table(["phase", "seconds"], [[name, f"{value:.1f}"] for name, value in found["seconds"].items()])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>LayAlign demo</title>'
        f"<style>{_STYLE}</style></head><body><h1>LayAlign demo</h1><ul>{settings}</ul><h2>Accuracy (%)</h2>"
        f"{_html_table(_header(), table_rows(found))}<p>{_legend()}</p>{images}"
        f"<h2>One problem in every language</h2><ul>{examples}</ul><h2>Time</h2>{times}</body></html>\n"
    )
