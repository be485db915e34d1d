"""The demo's report: `report.html` (self-contained) and `report.md` (with PNG files)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layalign.experiments.analysis.plots import gate_picture, mix_picture
from layalign.experiments.made_up.pipeline import SYSTEMS, table_rows
from layalign.experiments.made_up.plots import loss_curves
from layalign.experiments.made_up.problems import generate_problems
from layalign.experiments.pages import Report
from layalign.utils.files import write_whole

_LEGEND = "* low-resource: little text in the encoder's pre-training. + not in the task stage."


def write_report(folder: Path, found: dict[str, Any]) -> None:
    """Write both files, and the plots as PNG files for the Markdown one.

    Args:
        folder: the demo's folder.
        found: the content of `results.json`.
    """
    weights, layers = found["mix_weights"], found["encoder_layers"]
    language_layers = range(len(found["gates"]))
    pictures = {
        "losses": ("Loss curves", loss_curves(found["losses"])),
        "gates": ("Gates per LLM layer", gate_picture(found["gates"], language_layers)),
        "mix": (
            "Layer mix of the aligner",
            mix_picture({"keys": weights[0::2], "values": weights[1::2]}, language_layers, layers),
        ),
    }
    for name, (_, data) in pictures.items():
        write_whole(folder / f"{name}.png", data)
    report = Report(folder, "LayAlign demo")
    report.items(_setting_lines(found))
    report.heading("Accuracy (%)")
    report.table([["language", *SYSTEMS.values()], *table_rows(found)], _LEGEND)
    for name, (title, data) in pictures.items():
        report.heading(title)
        report.picture(name, title, data)
    report.heading("One problem in every language")
    report.items(_examples(found))
    report.heading("Time")
    report.table([["phase", "seconds"], *([name, f"{value:.1f}"] for name, value in found["seconds"].items())])
    report.write()


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


def _examples(found: dict[str, Any]) -> list[str]:
    """The first test problem in every language."""
    split, seed = found["settings"]["split"], found["seed"]
    return [f"{name}: {generate_problems(split, 1, name, seed)[0].question}" for name in found["languages"]]
