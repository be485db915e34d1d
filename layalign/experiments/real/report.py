"""The page's tables and plots, made from `results.json` only."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from layalign.experiments.analysis import plots
from layalign.experiments.analysis.result import METRICS, AnalysisResult
from layalign.experiments.pages import markdown_table, png
from layalign.experiments.real.ablation import SETS
from layalign.experiments.real.data import language_name
from layalign.utils.files import write_whole
from layalign.utils.pages import replaced
from layalign.utils.reading import read_json

PAGE = "report.md"
_GROUPS = ("all", "seen", "unseen", "high", "medium", "low")


def _cell(cell: dict[str, Any] | None, digits: int = 2, sign: bool = False) -> str:
    if cell is None:
        return "-"
    form = f"{'+' if sign else ''}.{digits}f"
    return f"{cell['mean']:{form}} [{cell['low']:{form}}, {cell['high']:{form}}]"


def _digits(measure: str) -> int:
    return 1 if measure in ("right", "chrf") else 2


def main_rows(found: dict[str, Any]) -> list[list[str]]:
    """Header, then a row per system: the measures over all test languages of Tatoeba."""
    rows = [["system", "seeds", "nats per token", "with another's source", "right one of N, %", "chrF"]]
    for system in found["systems"].values():
        cells = system["tatoeba"]["all"]
        names = ("nats", "nats_other", "right", "chrf")
        rows.append([system["label"], str(len(system["seeds"])), *(_cell(cells.get(m), _digits(m)) for m in names)])
    return rows


def headline(found: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """Title and rows of the main table."""
    return "test sentences of Tatoeba, mean over languages and seeds [95% interval]", main_rows(found)


def _group_rows(found: dict[str, Any], domain: str, measure: str) -> list[list[str]]:
    """A measure on a domain (NTREX: news, which are not in training), by group of languages."""
    groups = [group for group in _GROUPS if group in found["groups"][domain]]
    rows = [["system", *(f"{group} ({len(found['groups'][domain][group])})" for group in groups)]]
    for system in found["systems"].values():
        cells = system.get(domain) or {}
        values = [(cells.get(group) or {}).get(measure) for group in groups]
        if any(values):
            rows.append([system["label"], *(_cell(value, _digits(measure)) for value in values)])
    return rows


def difference_rows(found: dict[str, Any]) -> list[list[str]]:
    """Header, then a row per system except the first: its difference to the first."""
    first = found["settings"]["systems"][0]["name"]
    columns = [("all", "nats"), ("seen", "nats"), ("unseen", "nats"), ("all", "right"), ("all", "chrf")]
    rows = [["system", *(f"{group}: {measure}" for group, measure in columns)]]
    for name, system in found["systems"].items():
        cells = [system["tatoeba"].get(group, {}).get(measure, {}).get("difference") for group, measure in columns]
        if name != first and any(cells):
            texts = [_cell(cell, _digits(measure), True) for cell, (_, measure) in zip(cells, columns, strict=True)]
            rows.append([system["label"], *texts])
    return rows


def xnli_rows(found: dict[str, Any]) -> list[list[str]]:
    """Header, then a row per system of the task stage: accuracy by group of languages, difference to the first."""
    groups = [group for group in ("all", "English", "seen", "unseen", "high", "low") if _xnli(found, group)]
    rows = [["system", "seeds", *(f"{group} ({len(_xnli(found, group))})" for group in groups), "all: difference"]]
    for system in found["task"].values():
        of = system["xnli"]
        cells = [(of["languages"] if group == "English" else of).get(group) for group in groups]
        texts = [_cell(cell and cell["right"], 1) for cell in cells]
        difference = _cell(of["all"]["right"].get("difference"), 1, True)
        rows.append([system["label"], str(len(system["seeds"])), *texts, difference])
    return rows


def _xnli(found: dict[str, Any], group: str) -> list[str]:
    groups = found["groups"].get("xnli", {})
    return ["English"] if group == "English" and "English" in groups.get("all", ()) else groups.get(group, [])


def language_rows(found: dict[str, Any]) -> list[list[str]]:
    """Header, then a row per language: nats per token and chrF of each system."""
    systems = list(found["systems"].values())
    unseen = set(found["groups"]["tatoeba"].get("unseen", ()))
    rows = [["language", *(f"{system['label']}: nats / chrF" for system in systems)]]
    for code in found["groups"]["tatoeba"]["all"]:
        cells = []
        for system in systems:
            of = system["tatoeba"]["languages"].get(code)
            cells.append("-" if of is None else f"{of['nats']['mean']:.2f} / {of['chrf']['mean']:.1f}")
        rows.append([language_name(code) + (" (unseen)" if code in unseen else ""), *cells])
    return rows


def training_rows(found: dict[str, Any]) -> list[list[str]]:
    """Header, then a row per trained system: its parameters, the dev loss of each learning rate, and the choice."""
    rates = [f"{rate:g}" for rate in found["settings"]["learning_rates"]]
    tried = [f"dev at {rate}, step {found['settings']['choice_steps']}" for rate in rates]
    rows = [["system", "trained parameters", *tried, "chosen", "dev at the end"]]
    for system in found["systems"].values():
        runs = list(system["training"].values())
        if runs:
            choice = system["choice"] or {}
            tried = [f"{choice[rate]:.3f}" if rate in choice else "-" for rate in rates]
            ends = ", ".join(f"{run['dev_losses'][-1][1]:.3f}" for run in runs)
            rows.append(
                [system["label"], f"{runs[0]['trained_parameters']:,}", *tried, f"{runs[0]['learning_rate']:g}", ends]
            )
    return rows


def part_rows(found: dict[str, Any]) -> list[list[str]]:
    """Header, then a row per ablated system: nats per token of the whole, and the increase without each part."""
    rows = [["system", "with all", "no gates", "no soft tokens", *(f"encoder layers: no {name}" for name in SETS)]]
    for label, of in _ablated(found).items():
        values = [of.get("no gates"), of.get("no soft tokens"), *(of.get("layer sets", {}).get(name) for name in SETS)]
        lost = ["-" if value is None else f"{value - of['whole']:+.3f}" for value in values]
        rows.append([label, f"{of['whole']:.3f}", *lost])
    return rows


def representation_rows(found: dict[str, Any]) -> list[list[str]]:
    """Header, then a row per analyzed system: similarity of X and English in the LLM's middle state, by view."""
    analyses = {system["label"]: _analysis(system) for system in found["systems"].values() if "looks" in system}
    rows = [["system", "measure", *(next(iter(analyses.values())).similarity if analyses else ())]]
    for label, result in analyses.items():
        for metric in ("cka", "to_english"):
            values = (result.averages(view, metric)[result.layer] for view in result.similarity)
            rows.append([label, METRICS[metric], *(f"{value:.2f}" for value in values)])
    return rows


def _analysis(system: dict[str, Any]) -> AnalysisResult:
    return AnalysisResult.from_dict(system["looks"]["analysis"])


def _ablated(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {system["label"]: system["ablation"] for system in found["systems"].values() if "ablation" in system}


TABLES: dict[str, Callable[[dict[str, Any]], list[list[str]]]] = {
    "parts": part_rows,
    "main": main_rows,
    "differences": difference_rows,
    "nats": partial(_group_rows, domain="tatoeba", measure="nats"),
    "chrf": partial(_group_rows, domain="tatoeba", measure="chrf"),
    "news": partial(_group_rows, domain="ntrex", measure="nats"),
    "xnli": xnli_rows,
    "languages": language_rows,
    "representations": representation_rows,
    "training": training_rows,
}


PICTURES = {
    "curves": "Dev loss of every run",
    "parts": "Gates, and the loss without each LLM layer's gated term",
    "layers": "Encoder layers: retrieval, token similarity, mix weight, and the loss without each",
    "mix": "The aligner's mix",
    "gates": "Gates over training",
    "similarity": "X and English inside the LLM, layer by layer",
    "tsne": "Sentences in the LLM's middle state, t-SNE",
}


def state(found: dict[str, Any]) -> str:
    """Sentences about the finished and the missing runs, and about the data."""
    done = sum(len(system["seeds"]) for system in found["systems"].values())
    lines = [f"{done} runs are done."]
    if found["missing"]:
        seeds: dict[str, list[str]] = {}
        for run in found["missing"]:
            name, seed = run.removeprefix("translation, ").rsplit(", seed ", 1)
            seeds.setdefault(name, []).append(seed)
        runs = "; ".join(f"{name} ({', '.join(each)})" for name, each in seeds.items())
        lines.append(f"Not run yet, with the seeds in brackets ({len(found['missing'])}): {runs}.")
    data = found["data"]
    lines.append(
        f"Trained on {data['train']['pairs']:,} pairs of {data['train']['languages']} languages; "
        f"{data['dev']['pairs']} dev pairs; {data['test']['pairs']:,} test pairs, and "
        f"{data['other_domain']['pairs']:,} of news. "
        f"{data['left_out_of_training']:,} pairs were left out of training: their English is in dev or test."
    )
    return "\n".join(lines) + "\n"


def curves(found: dict[str, Any]) -> bytes:
    """Dev loss over training, a line per run."""
    figure = Figure(figsize=(8, 4.5))
    axis = figure.subplots()
    for colour, system in zip(colormaps["tab20"](range(20)), found["systems"].values(), strict=False):
        for i, run in enumerate(system["training"].values()):
            steps, losses = zip(*[(step, loss) for step, loss in run["dev_losses"] if step], strict=True)
            axis.plot(steps, losses, color=colour, label=system["label"] if i == 0 else None, linewidth=1.4)
    axis.set(xlabel="step", ylabel="dev loss, nats per token")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return png(figure, metadata={"Software": None})


def parts(ablated: dict[str, dict[str, Any]]) -> bytes:
    """Gates, and the loss without each LLM layer's gated term, for each ablated system."""
    figure = Figure(figsize=(9, 2.6 * len(ablated)))
    for row, (label, of) in zip(figure.subplots(len(ablated), 2, squeeze=False), ablated.items(), strict=True):
        layers = [int(layer) for layer in of["LLM layers"]]
        row[0].bar(layers, of["gates"])
        row[1].bar(layers, [value - of["whole"] for value in of["LLM layers"].values()])
        row[0].set(title=label, xlabel="LLM layer", ylabel="gate")
        row[1].set(title="without this layer's gated term", xlabel="LLM layer", ylabel="increase of nats per token")
    figure.tight_layout()
    return png(figure, metadata={"Software": None})


def layers(system: dict[str, Any]) -> bytes:
    """By encoder layer: retrieval of English, similarity of a sentence's tokens, mix weight, and loss without it."""
    figure = Figure(figsize=(13, 3), layout="constrained")
    zero, one, two, three = figure.subplots(1, 4)
    for axis, name, factor in ((zero, "encoder retrieval", 100), (one, "token likeness", 1)):
        rows = list(system["looks"][name].values())
        means = [factor * sum(column) / len(rows) for column in zip(*rows, strict=True)]
        axis.plot(means, marker="o", markersize=3)
    zero.set(title="retrieval of English", ylabel="% of sentences", ylim=(0, 100))
    one.set(title="similarity of tokens", ylabel="cosine within a sentence", ylim=(None, 1))
    lost = system["ablation"]["encoder layers"]
    numbers = [int(layer) for layer in lost]
    for name, values in system["ablation"]["encoder layer weights"].items():
        two.plot(numbers, values, marker="o", markersize=3, label=name)
    two.set(title="mix weight", ylabel="mean |weight| in the mix", ylim=(0, None))
    two.legend()
    three.bar(numbers, [value - system["ablation"]["whole"] for value in lost.values()])
    three.set(title="without this layer", ylabel="increase of nats per token")
    for axis in (zero, one, two, three):
        axis.set(xlabel="encoder layer (0: embeddings)")
        axis.grid(alpha=0.3)
    return png(figure, metadata={"Software": None})


def pictures(found: dict[str, Any]) -> dict[str, Callable[[], bytes]]:
    """Functions that draw the plots, by name; only plots with data."""
    made: dict[str, Callable[[], bytes]] = {"curves": lambda: curves(found)}
    if ablated := {label: of for label, of in _ablated(found).items() if of.get("LLM layers")}:
        made["parts"] = lambda: parts(ablated)
    looked = next((system for system in found["systems"].values() if "looks" in system), None)
    if looked is not None and looked["looks"]["analysis"]["mix"] is not None:
        if "ablation" in looked:
            made["layers"] = lambda: layers(looked)
        result = _analysis(looked)
        mix, gates, own = result.mix, result.gates or [], result.language_layers
        made["mix"] = lambda: plots.mix_picture(mix or {}, own, result.encoder_layers)
        made["gates"] = lambda: plots.gate_picture(gates, own, result.gate_history)
        made["similarity"] = lambda: plots.similarity_picture(result)
        made["tsne"] = lambda: plots.projection_picture(result, "tsne")
    return made


def written_into(page: str, found: dict[str, Any]) -> str:
    """``page`` with the tables and plots between its markers replaced by those of a result."""
    for name, rows in TABLES.items():
        begin, end = f"<!-- evidence: {name} -->", f"<!-- end of {name} -->"
        if begin in page:
            page = replaced(page, begin, end, markdown_table(rows(found)))
    for name in pictures(found):
        begin, end = f"<!-- evidence: picture of {name} -->", f"<!-- end of picture of {name} -->"
        if begin in page:
            page = replaced(page, begin, end, f"![{PICTURES[name]}](images/evidence-{name}.png)\n")
    return replaced(page, "<!-- evidence: state -->", "<!-- end of state -->", state(found))


def write_report(folder: Path, found: dict[str, Any]) -> None:
    """Write `report.md` and the plots into the experiment's folder."""
    tables = [f"## {name}\n\n{markdown_table(rows(found))}" for name, rows in TABLES.items()]
    write_whole(folder / "report.md", "\n".join(["# Evidence\n", state(found), *tables]))
    for name, draw in pictures(found).items():
        write_whole(folder / f"{name}.png", draw())


if __name__ == "__main__":  # RESULTS PAGE: update the tables and plots of a page of the documentation
    result, page = Path(sys.argv[1]), Path(sys.argv[2])
    content = read_json(result)
    page.write_text(written_into(page.read_text(encoding="utf-8"), content), encoding="utf-8")
    for name, draw in pictures(content).items():
        write_whole(page.parent / "images" / f"evidence-{name}.png", draw())
