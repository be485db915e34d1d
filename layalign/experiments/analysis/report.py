"""The report of an analysis: a page with embedded plots, the numbers as JSON, and the plots as PNG."""

from __future__ import annotations

import html
import json
from pathlib import Path

from layalign.experiments.analysis import plots
from layalign.experiments.analysis.attention_svg import caption, map_svg
from layalign.experiments.analysis.result import METRICS, AnalysisResult
from layalign.experiments.pages import STYLE, image, items, page, paragraphs, table
from layalign.utils.files import write_whole, writing

PAGE, NUMBERS = "report.html", "analysis.json"
_STYLE = """
.chart { overflow-x: auto } svg text { font: 12px system-ui, sans-serif }
.note { background: #f4f4f4; padding: .5rem 1rem }
"""
_NO_ALIGNER = (
    "This model has no aligner (its language_layers are empty): no mix weights, gates or attention to the source."
)

Pictures = dict[str, bytes]


def write_report(result: AnalysisResult, folder: Path) -> Path:
    """Write `report.html`, `analysis.json` and the PNG files into ``folder``.

    Returns:
        The page.
    """
    with writing(f"output_dir: {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(result)
    for name, data in pictures.items():
        write_whole(folder / f"{name}.png", data)
    numbers = json.dumps(result.to_dict(), ensure_ascii=False, allow_nan=False)
    write_whole(folder / NUMBERS, numbers + "\n")
    write_whole(folder / PAGE, _page(result, pictures))
    return folder / PAGE


def _pictures(result: AnalysisResult) -> Pictures:
    pictures: Pictures = {}
    if result.mix is not None and result.gates is not None:
        pictures["mix"] = plots.mix_picture(result.mix, result.language_layers, result.encoder_layers)
        pictures["gates"] = plots.gate_picture(result.gates, result.language_layers, result.gate_history)
        pictures["contribution"] = plots.contribution_picture(result)
    pictures["similarity"] = plots.similarity_picture(result)
    for metric in METRICS:
        pictures[f"similarity_{metric}"] = plots.language_picture(result, metric)
    pictures["pca"] = plots.projection_picture(result, "pca")
    pictures["tsne"] = plots.projection_picture(result, "tsne")
    return pictures


def _page(result: AnalysisResult, pictures: Pictures) -> str:
    sections = (_summary, _fusion, _similarity, _projections, _attention)
    body = "".join(section(result, pictures) for section in sections)
    return page("LayAlign analysis", f"<h1>LayAlign analysis</h1>{body}", STYLE + _STYLE)


def _summary(result: AnalysisResult, pictures: Pictures) -> str:
    settings = result.settings
    cut = ", ".join(f"{count} of {what}" for what, count in settings.get("cut", {}).items())
    known = {
        "checkpoint": settings["checkpoint"],
        "encoder": settings["encoder"],
        "LLM": f"{settings['llm'] or 'unnamed'}, {settings['llm_layers']} layers",
        "encoder layers": ", ".join(map(str, result.encoder_layers)),
        "LLM layers that attend": ", ".join(map(str, result.language_layers)) or "none",
        "aligner": f"{settings['structure']}, mix {settings['mix']}" if result.mix is not None else "none",
        "adapter (soft tokens)": "yes" if settings["adapter"] else "no",
        "LoRA on the LLM": "yes" if settings["lora"] else "no",
        "sentences": ", ".join(f"{name} {count}" for name, count in result.sentences.items()),
        "maximum sentence length": f"{settings['max_length']} tokens; truncated: {cut or 'none'}",
        "seed": str(settings["seed"]),
        "versions": ", ".join(f"{name} {version}" for name, version in settings["versions"].items()),
    }
    return table(["", ""], [[name, str(value)] for name, value in known.items() if value is not None])


def _fusion(result: AnalysisResult, pictures: Pictures) -> str:
    if result.mix is None:
        return "<h2>Mix weights, gates, contribution</h2>" + paragraphs(_NO_ALIGNER, kind="note")
    parts = [
        "<h2>Mix weights</h2>",
        paragraphs(
            "How much of every encoder layer (columns) goes into the key state and the value state of every LLM layer "
            "(rows): the learned weights, before the ReLU. Both maps have the same colour scale, white at 0."
        ),
        image(pictures["mix"], "Mix weights: LLM layer by encoder layer"),
        "<h2>Gates</h2>",
        paragraphs(
            "The factor of each LLM layer's attention to the source. It is learned from 0, unless it is fixed. Its "
            "sign says little, because the value states can change their sign too."
        ),
    ]
    if not result.gate_history:
        note = "Gates over training are not shown: the checkpoint's folder has no gates.jsonl, which training writes."
        parts.append(paragraphs(note, kind="note"))
    parts += [
        image(pictures["gates"], "Gates" + (" now, and at every logged step" if result.gate_history else "")),
        "<h2>Contribution</h2>",
        paragraphs(
            "The size of the source's contribution in each layer: ||gate * softmax(q k) v|| / ||self-attention "
            "output||, over all heads, before the output projection. It is the mean over the positions of the English "
            "translation while the model reads [source -> translation]."
        ),
        image(
            pictures["contribution"],
            "Contribution norm per LLM layer. Bars: mean over the positions of all languages; the rest: by language",
        ),
    ]
    return "".join(parts)


def _views(result: AnalysisResult) -> str:
    words = {
        "LLM alone": "LLM alone: the LLM reads the text itself, without encoder, aligner and LoRA.",
        "untrained": "untrained: the text goes through encoder, adapter and aligner with new, untrained weights.",
        "before": "before: the text goes through encoder, adapter and aligner of the other checkpoint.",
        "LayAlign": "LayAlign: the text goes through encoder, adapter and aligner of this model.",
    }
    return items(words[view] for view in result.similarity)


def _similarity(result: AnalysisResult, pictures: Pictures) -> str:
    header = ["language"] + [f"{title}: {view}" for title in METRICS.values() for view in result.similarity]
    rows = [
        [language]
        + [
            f"{getattr(view[language], metric)[result.layer]:.3f}"
            for metric in METRICS
            for view in result.similarity.values()
        ]
        for language in result.sentences
    ]
    where = "the soft tokens" if result.settings["adapter"] else "the text's tokens (this model has no soft tokens)"
    parts = [
        "<h2>Similarity of X and English inside the LLM</h2>",
        paragraphs(
            "Each sentence and its English translation are read separately, in the same way. The vector of a sentence "
            f"is the mean of a layer's hidden states over {where}; for the LLM alone, over the text's tokens."
        ),
        _views(result),
        paragraphs(
            "Centred cosine: mean cosine of the pairs, each language's own mean subtracted. Linear CKA: Kornblith et "
            "al. 2019; with few sentences it is high even without alignment, so the dotted lines show it for sentences "
            "paired at random. Retrieval: share of sentences whose nearest neighbour by cosine is their translation, "
            "as in Tatoeba/LASER (Artetxe and Schwenk 2019); the dotted line is chance."
        ),
        image(
            pictures["similarity"], "Lines: means over the languages; bands: from the lowest to the highest language"
        ),
    ]
    for metric, title in METRICS.items():
        parts.append(image(pictures[f"similarity_{metric}"], f"{title[0].upper()}{title[1:]} by language and layer"))
    parts += [f"<h3>Hidden state {result.layer}</h3>", table(header, rows)]
    return "".join(parts)


def _projections(result: AnalysisResult, pictures: Pictures) -> str:
    perplexity = next(iter(result.projections.values())).perplexity
    return "".join(
        [
            f"<h2>Sentences in two dimensions: hidden state {result.layer}</h2>",
            paragraphs(
                "The same sentence vectors, one point per sentence, coloured by language. Each view is fitted "
                "separately. PCA shows the two directions of most variance. t-SNE (van der Maaten and Hinton 2008; "
                f"perplexity {perplexity:g}, seed {result.settings['seed']}) shows which sentences are neighbours; "
                "distances between clusters and sizes of clusters mean nothing."
            ),
            image(pictures["pca"], "PCA"),
            image(pictures["tsne"], "t-SNE"),
        ]
    )


def _attention(result: AnalysisResult, pictures: Pictures) -> str:
    shown = result.attention
    if shown is None:
        return ""
    answer = "the model's own answer" if shown.generated else "its English translation"
    parts = [
        "<h2>Attention to the source</h2>",
        paragraphs(
            f"From the tokens of {answer} (rows, read by the LLM) to the source's tokens (columns): softmax(q k), mean "
            "over heads, one map per LLM layer, each with its own colour scale. Each row sums to 1. A dot marks a "
            "token that continues the character before it.",
            f"{shown.language}: {shown.source}",
            f"{'Answer' if shown.generated else 'English'}: {shown.answer}",
        ),
    ]
    for slot, layer in enumerate(result.language_layers):
        title = html.escape(caption(shown, slot, layer, result.gates))
        parts.append(f"<details open><summary>{title}</summary>{map_svg(shown, slot)}</details>")
    return "".join(parts)
