"""The demo's page: one self-contained HTML file."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layalign.data.languages import language_of
from layalign.data.prompts import one_line
from layalign.experiments import charts, pages
from layalign.experiments.demo import live
from layalign.experiments.demo.run import ALL_LANGUAGES, SYSTEMS, UNSEEN, by_training_text, pairs_text
from layalign.experiments.pages import page, paragraphs
from layalign.utils.files import write_whole

_STYLE = Path(__file__).with_name("page.css")


def write_page(found: dict[str, Any], file: Path) -> None:
    """Write the page.

    Args:
        found: the content of `demo.json`.
        file: the file to write.
    """
    sections = (_head, _scores, _answers, _live, _training, _gates, _mix, _retrieval, _attention, _how)
    body = "".join(section(found) for section in sections)
    write_whole(file, page("LayAlign demo", f"<main>{body}</main>", _STYLE.read_text(encoding="utf-8")))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table; the cells of `rows` are HTML."""
    return f'<div class="scroll">{pages.table(header, rows, kind, marked=True)}</div>'


def _head(found: dict[str, Any]) -> str:
    what, scores = found["models"], found["scores"]

    def both(group: str, measure: str, digits: int, words: str) -> tuple[str, str]:
        ours, alone = (f"{scores[system][group][measure]:.{digits}f}" for system in ("layalign", "llm"))
        return ours, f"{words}; {alone} for the LLM alone"

    tiles = [
        both(ALL_LANGUAGES, "chrf", 1, "chrF with LayAlign"),
        both(ALL_LANGUAGES, "nats", 2, "nats per token of the reference"),
    ]
    if UNSEEN in scores["llm"]:
        tiles.append(both(UNSEEN, "chrf", 1, "chrF in languages without a training pair"))
    millions = f"{what['trained'] / 1e6:.2f}\u00a0M", f"{what['frozen'] / 1e6:.0f}\u00a0M"
    tiles.append((millions[0], f"trained parameters; {millions[1]} are frozen"))
    cards = "".join(f"<div><b>{html.escape(big)}</b><span>{html.escape(small)}</span></div>" for big, small in tiles)
    notes = "".join(paragraphs(note, kind="note") for note in found["notes"])
    return (
        "<header><h1>LayAlign</h1>"
        + paragraphs(
            f"A frozen multilingual encoder ({what['encoder']}) reads a sentence in any of its languages. A small "
            f"trained bridge passes the states of every encoder layer to every layer of a frozen, English-centred "
            f"language model ({what['llm']}), which writes the English. This page was made on this machine, in "
            f"{sum(found['seconds'].values()):.0f} seconds, from sentences that were written for it.",
            kind="lead",
        )
        + f'</header><div class="tiles">{cards}</div>{notes}'
    )


def _bar(value: float, other: float, colour: str, text: str) -> str:
    """A number with a bar, as long as its share of the larger of both values."""
    share = 100 * value / max(value, other, 1e-9)
    return f'<span class="bar"><i class="{colour}" style="width:{share:.0f}%"></i></span>{text}'


def _scores(found: dict[str, Any]) -> str:
    count, scores = found["options"]["sentences"], found["scores"]
    groups = [group for group in (ALL_LANGUAGES, UNSEEN) if group in scores["llm"]]
    most = {
        measure: max(row[measure] for system in scores.values() for row in system.values())
        for measure in ("chrf", "nats")
    }
    rows = []
    for name in [*by_training_text(found), *groups]:
        about = found["languages"].get(name)
        cells = [html.escape(name if about else f"Mean: {name}")]
        cells.append(pairs_text(about["pairs"]) if about else "")
        cells.append(html.escape(about["level"] or "") if about else "")
        for measure, digits in (("chrf", 1), ("nats", 2)):
            for system, colour in (("llm", "c2"), ("layalign", "c1")):
                value = scores[system][name][measure]
                cells.append(_bar(value, most[measure], colour, f"{value:.{digits}f}"))
        rows.append(cells)
    header = ["Language", "Training pairs", "Resources"]
    header += [f"{measure}, {label}" for measure in ("chrF", "Nats per token") for label in SYSTEMS.values()]
    return (
        f"<h2>{len(found['languages'])} languages into English</h2>"
        + paragraphs(
            f"{count} sentences per language, with the same English in each. chrF (sacrebleu, 0 to 100, higher is "
            "better) compares the answer with the reference. Nats per token (lower is better) is how unlikely the "
            "reference, including its end, is for the system; it says more where no answer is right. The LLM alone "
            "gets three examples of the language before each sentence, which worked better than its chat template. "
            "Training pairs: sentence pairs of the language in the checkpoint's training text. Resources: class of "
            "Joshi et al. (2020). With so few sentences, differences of a few points between languages mean nothing."
        )
        + _table(header, rows, "scores")
    )


def _answers(found: dict[str, Any]) -> str:
    parts = [
        "<h2>Every answer</h2>",
        paragraphs("All answers of greedy search, including the bad ones. Choose a language to see its sentences."),
    ]
    for place, name in enumerate(by_training_text(found)):
        code = language_of(name).alpha2 or language_of(name).alpha3
        rows = [
            [
                f'<span lang="{code}" dir="auto">{html.escape(row["source"])}</span>',
                html.escape(row["reference"]),
                *(html.escape(one_line(row[system])) or "<em>nothing</em>" for system in SYSTEMS),
            ]
            for row in found["rows"][name]
        ]
        pairs = found["languages"][name]["pairs"]
        note = {None: "", 0: "no training pairs"}.get(pairs, f"{pairs:,} training pairs" if pairs else "")
        scores = ", ".join(f"{label} {found['scores'][key][name]['chrf']:.0f}" for key, label in SYSTEMS.items())
        table = _table(["Sentence", "Reference", *SYSTEMS.values()], rows, "answers")
        parts.append(
            f"<details{' open' if place == 0 or pairs == 0 else ''}><summary><b>{html.escape(name)}</b> "
            f"<small>{html.escape(note)}{'; ' if note else ''}chrF {scores}</small></summary>{table}</details>"
        )
    return "".join(parts)


def _live(found: dict[str, Any]) -> str:
    curves = found["live"]
    if curves is None:
        return ""
    lines = []
    for (name, label), colour in zip(live.SYSTEMS.items(), ("c1", "c2"), strict=True):
        lines.append(charts.Line(f"{label}: batches", list(enumerate(curves["batches"][name])), colour, True))
        lines.append(charts.Line(f"{label}: held out", [tuple(p) for p in curves["held_out"][name]], colour))
    options = found["options"]
    trained = " and ".join(f"{number:,}" for number in curves["trained"].values())
    return (
        "<h2>Trained just now, from scratch</h2>"
        + paragraphs(
            f"Two systems with new weights and gates at zero, on the same batches: {options['steps']} steps of "
            f"{options['batch_size']} pairs from {curves['pairs']} sentence pairs in six languages, {trained} trained "
            f"parameters. Held out: {curves['held_out_pairs']} pairs whose English is not trained on. This is far too "
            "little to translate anything: the loss falls mostly because the adapter learns that short English "
            "sentences are expected. The benefit of the layers shows after some hundred steps; see the checkpoint's "
            "own curve."
        )
        + charts.line_chart(lines, "step", "loss, nats per token")
    )


def _training(found: dict[str, Any]) -> str:
    about = found["about"]
    if not about.get("curves"):
        return ""
    colours = ("c1", "c2", "c3", "c4")
    lines = [
        charts.Line(name, [tuple(point) for point in points], colour)
        for (name, points), colour in zip(about["curves"].items(), colours, strict=False)
    ]
    return (
        "<h2>How the shipped checkpoint was trained</h2>"
        + paragraphs(str(about.get("what", "")))
        + charts.line_chart(lines, "step", "dev loss, nats per token")
    )


def _gates(found: dict[str, Any]) -> str:
    looks = found["inside"]
    if not looks["gates"]:
        return ""
    parts = [
        "<h2>Gates</h2>",
        paragraphs(
            "The learned factor of each LLM layer's attention to the source. All started at 0. The sign says little, "
            "because the value states can change their sign too."
        ),
        charts.bar_chart(looks["gates"], [str(layer) for layer in looks["language_layers"]], "LLM layer", "gate"),
    ]
    history = looks["gate_history"]
    if len(history) > 1:
        means = [(entry["step"], sum(map(abs, entry["gates"])) / len(entry["gates"])) for entry in history]
        largest = [(entry["step"], max(map(abs, entry["gates"]))) for entry in history]
        lines = [charts.Line("mean size", means, "c1"), charts.Line("largest", largest, "c3")]
        parts.append(charts.line_chart(lines, "training step", "size of the gates", low=0.0))
    return "".join(parts)


def _mix(found: dict[str, Any]) -> str:
    looks = found["inside"]
    if looks["mix"] is None:
        return ""
    limit = max((abs(w) for rows in looks["mix"].values() for row in rows for w in row), default=1.0)
    maps = "".join(
        f"<figure>{_mix_map(looks, rows, limit)}<figcaption>{name}</figcaption></figure>"
        for name, rows in looks["mix"].items()
    )
    return (
        "<h2>Which encoder layers each LLM layer uses</h2>"
        + paragraphs(
            "The aligner's learned weights: one row for each LLM layer, one column for each encoder layer (0: the "
            f"embeddings). Blue is positive, orange negative; full colour is {limit:.2f}."
        )
        + f'<div class="beside">{maps}</div>'
    )


def _mix_map(looks: dict[str, Any], rows: list[list[float]], limit: float) -> str:
    labels = [str(layer) for layer in looks["language_layers"]], [str(layer) for layer in looks["encoder_layers"]]
    return charts.heat_map(rows, *labels, cell=(26, 15), limit=limit, names=("encoder layer", "LLM layer"))


def _retrieval(found: dict[str, Any]) -> str:
    accuracy = found["inside"]["retrieval"]
    unseen = [name for name in accuracy if found["languages"][name]["pairs"] == 0]
    groups = {"mean of all languages": list(accuracy), UNSEEN: unseen}
    lines = []
    for (name, members), colour in zip(groups.items(), ("c1", "c3"), strict=True):
        if members:
            points = zip(*(accuracy[member] for member in members), strict=True)
            lines.append(charts.Line(name, [(i, 100 * sum(p) / len(p)) for i, p in enumerate(points)], colour))
    lowest = [(i, 100 * min(row)) for i, row in enumerate(zip(*accuracy.values(), strict=True))]
    lines.append(charts.Line("lowest language", lowest, "c2", True))
    return (
        "<h2>Where the encoder aligns languages</h2>"
        + paragraphs(
            "Share of our sentences whose English translation is the nearest of 15 by the mean state of an encoder "
            "layer, after subtracting the mean of each language (chance: 7 %). The layers differ in what they encode, "
            "and the aligner may use each of them."
        )
        + charts.line_chart(lines, "encoder layer (0: embeddings)", "found, %", low=0.0)
    )


def _attention(found: dict[str, Any]) -> str:
    looks = found["inside"]
    shown = looks["attention"]
    if shown is None:
        return ""
    maps = []
    for slot, weights in zip(shown["slots"], shown["weights"], strict=True):
        limit = max(max(row) for row in weights)
        picture = charts.heat_map(weights, shown["rows"], shown["columns"], cell=(22, 18), limit=limit, slanted=True)
        layer, gate = looks["language_layers"][slot], looks["gates"][slot]
        caption = f"LLM layer {layer}, gate {gate:+.3f}; full colour is {limit:.2f}"
        maps.append(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")
    return (
        "<h2>What the LLM attends to in the source</h2>"
        + paragraphs(
            f"{shown['language']}: “{shown['source']}” Answer: “{shown['answer'].strip()}” Rows are the answer's "
            f"tokens, columns the source's. The weights are means over heads; each row sums to 1. Shown are the "
            f"{len(maps)} layers with the largest gates."
        )
        + f'<div class="beside">{"".join(maps)}</div>'
    )


def _how(found: dict[str, Any]) -> str:
    what, machine, about = found["models"], found["machine"], found["about"]
    size = "" if what["bytes"] is None else f", {what['bytes'] / 1e6:.1f} MB"
    known = {
        "encoder, frozen": what["encoder"],
        "LLM, frozen": what["llm"],
        "checkpoint": f"{what['checkpoint']}: adapter, aligner and gates, {what['trained']:,} parameters{size}",
        "trained on": about.get("text"),
        "trained by": about.get("command"),
        "machine": f"{machine['cores']} cores, {machine['threads']} threads, float32, no GPU; {machine['day']}",
        "versions": f"Python {machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}",
        "longest answer": "20 tokens, greedy",
    }
    rows = [[html.escape(name), html.escape(str(value))] for name, value in known.items() if value]
    times = [[html.escape(name), f"{value:.1f} s"] for name, value in found["seconds"].items()]
    return (
        "<h2>How this page was made</h2>"
        + _table(["", ""], rows, "facts")
        + _table(["Phase", "Time"], [*times, ["all", f"{sum(found['seconds'].values()):.1f} s"]], "facts")
    )
