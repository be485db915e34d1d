"""The demo: load the models, ask both systems, train briefly, write the page."""

from __future__ import annotations

import json
import os
import platform
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from layalign.data import Example
from layalign.evaluation.answering import llm_alone
from layalign.evaluation.levels import resource_level
from layalign.experiments.demo import live, models
from layalign.experiments.demo.asking import Answer, layalign_answers, llm_answers, score
from layalign.experiments.demo.looks import inside
from layalign.experiments.demo.sentences import sentences
from layalign.experiments.progress import Phases
from layalign.utils.errors import whole_number
from layalign.utils.files import write_whole, writing
from layalign.utils.lock import held

SYSTEMS = {"llm": "LLM alone", "layalign": "LayAlign"}
ALL_LANGUAGES, UNSEEN = "all languages", "in no training text"
PAGE, NUMBERS = "demo.html", "demo.json"
_LONGEST_ANSWER = 20  # tokens
_LONGEST_PROMPT = 2048
_HELD_OUT = 12
_FEWEST = 2  # sentences per language
_SHOWN = ("Swahili", 1)  # whose attention is shown: a language and the number of its sentence


@dataclass(frozen=True)
class DemoOptions:
    """Options of the demo.

    Attributes:
        sentences: number of sentences per language, from the start of the file; 2 to 12.
        steps: steps of the short training run; 0 skips it.
        batch_size: pairs per step.
        seed: seed of the training run.
    """

    sentences: int = 4
    steps: int = 12
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        whole_number("sentences", self.sentences, least=_FEWEST)
        whole_number("steps", self.steps, least=0)
        whole_number("batch_size", self.batch_size, least=1)
        whole_number("seed", self.seed, least=0)


def run_demo(
    output_dir: str | Path,
    weights: str | Path,
    checkpoint: str | Path = models.SHIPPED,
    options: DemoOptions | None = None,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Run the demo and write the page `demo.html`, and `demo.json` with all its numbers and answers.

    Args:
        output_dir: folder for both; created if needed.
        weights: folder with `encoder` and `llm`, as `layalign weights` writes it.
        checkpoint: checkpoint of a LayAlign model for these two; by default the one in the package.
        options: options of the demo.
        progress: show progress bars and tables.

    Returns:
        The content of `demo.json`.

    Raises:
        ArgumentError: weights or checkpoint are missing, or another run is writing into `output_dir`.
        CheckpointError: they cannot be read, or do not fit each other.
    """
    options, folder = options or DemoOptions(), Path(output_dir)
    place, source = Path(checkpoint).expanduser(), Path(weights).expanduser()
    models.require(place, source)
    with writing(f"output_dir: {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        return _run(folder, source, place, options, Phases(Console(), progress))


def _run(folder: Path, weights: Path, checkpoint: Path, options: DemoOptions, phases: Phases) -> dict[str, Any]:
    from layalign.experiments.demo.page import write_page

    with phases.phase("load encoder, LLM and checkpoint"):
        joined = models.load(checkpoint, weights)
    if phases.shown:
        for note in joined.notes:
            phases.console.print(f"note: {note}", style="yellow")
    questions, shown = sentences("test", options.sentences), sentences("examples")
    answers = _ask(joined, questions, shown, phases)
    with phases.phase("look inside: gates, mix, retrieval by layer, attention"):
        parallel = {name: [*rows, *shown[name]] for name, rows in sentences("test").items()}
        language, number = _SHOWN
        looks = inside(joined, checkpoint, parallel, questions[language][number - 1])
    found: dict[str, Any] = {
        "options": asdict(options),
        "about": joined.about,
        "notes": joined.notes,
        "models": _models(joined, checkpoint),
        "languages": {
            name: {"pairs": joined.pairs_read(name), "level": resource_level(name), "sentences": len(rows)}
            for name, rows in questions.items()
        },
        "rows": _rows(questions, answers),
        "scores": _scores(joined, questions, answers),
        "inside": looks,
    }
    if phases.shown:
        phases.console.print(score_table(found))
    found["live"] = _train(joined, options, phases) if options.steps else None
    found["seconds"] = dict(phases.seconds)
    found["machine"] = {
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "python": platform.python_version(),
        "torch": torch.__version__, "transformers": transformers.__version__, "day": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    write_whole(folder / NUMBERS, json.dumps(found, ensure_ascii=False, indent=1) + "\n")
    write_page(found, folder / PAGE)
    if phases.shown:
        total = sum(phases.seconds.values())
        phases.console.print(f"{total:.0f} s in total. The page with every answer: {folder / PAGE}")
    return found


def _ask(
    joined: models.Joined, questions: dict[str, list[Example]], shown: dict[str, list[Example]], phases: Phases
) -> dict[str, dict[str, list[Answer]]]:
    """The answers to all questions, by system and language."""
    count, examples = sum(map(len, questions.values())), [example for rows in shown.values() for example in rows]
    with phases.counting(f"{SYSTEMS['llm']}: {count} sentences, 3 examples before each", count) as advance:
        alone = llm_alone(
            joined.model.llm, joined.llm_tokenizer, examples=examples, max_new_tokens=_LONGEST_ANSWER,
            max_prompt_length=_LONGEST_PROMPT,
        )  # fmt: skip
        by_itself = llm_answers(alone, questions, advance)
    with phases.counting(f"{SYSTEMS['layalign']}: the same sentences", count) as advance:
        return {"llm": by_itself, "layalign": layalign_answers(joined, questions, _LONGEST_ANSWER, advance)}


def _train(joined: models.Joined, options: DemoOptions, phases: Phases) -> dict[str, Any]:
    pairs = [pair for rows in sentences("train").values() for pair in rows]
    asked = [example for name, rows in sentences("test").items() if name in sentences("train") for example in rows]
    held_out = random.Random(options.seed).sample(asked, _HELD_OUT)
    parts = joined.model.encoder, joined.model.unload()
    every = max(1, options.steps // 4)
    with phases.phase(f"train from scratch: {options.steps} steps of {options.batch_size} pairs, two systems") as bar:

        def show(step: int, steps: int, losses: dict[str, float]) -> None:
            bar(step, steps, losses["all"])
            if phases.shown and step % every == 0:
                shown = ", ".join(f"{live.SYSTEMS[name]} {loss:.2f}" for name, loss in losses.items())
                phases.console.print(f"  step {step}: loss {shown}")

        curves = live.train_live(
            *parts, (joined.encoder_tokenizer, joined.llm_tokenizer), pairs, held_out, steps=options.steps,
            batch_size=options.batch_size, seed=options.seed, show=show,
        )  # fmt: skip
    if phases.shown:
        for name, label in live.SYSTEMS.items():
            points = ", ".join(f"{loss:.2f} after {step}" for step, loss in curves.held_out[name])
            phases.console.print(f"  {label}: held-out loss {points} steps")
    return {**asdict(curves), "held_out_pairs": _HELD_OUT}


# The content of demo.json


def _models(joined: models.Joined, checkpoint: Path) -> dict[str, Any]:
    model = joined.model
    file = checkpoint / "model.safetensors"
    return {
        "encoder": model.config.encoder_name_or_path,
        "llm": model.config.llm_name_or_path,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "frozen": sum(p.numel() for p in model.parameters() if not p.requires_grad),
        "bytes": file.stat().st_size if file.is_file() else None,
        "checkpoint": "shipped with layalign" if checkpoint == models.SHIPPED else str(checkpoint),
    }


def _rows(
    questions: dict[str, list[Example]], answers: dict[str, dict[str, list[Answer]]]
) -> dict[str, list[dict[str, str]]]:
    return {
        name: [
            {
                "source": example.source,
                "reference": example.target,
                **{system: answers[system][name][place].text for system in SYSTEMS},
            }
            for place, example in enumerate(rows)
        ]
        for name, rows in questions.items()
    }


def _scores(
    joined: models.Joined, questions: dict[str, list[Example]], answers: dict[str, dict[str, list[Answer]]]
) -> dict[str, dict[str, dict[str, float]]]:
    """chrF and nats per token, by system, then by language and for means over languages."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    unseen = [name for name in questions if joined.pairs_read(name) == 0]
    for system in SYSTEMS:
        own = {name: score(answers[system][name], rows) for name, rows in questions.items()}
        found[system] = dict(own)
        for group, names in ((ALL_LANGUAGES, list(questions)), (UNSEEN, unseen)):
            if names:
                found[system][group] = {
                    measure: sum(own[name][measure] for name in names) / len(names) for measure in ("chrf", "nats")
                }
    return found


def by_training_text(found: dict[str, Any]) -> list[str]:
    """The languages by the number of their pairs in the training text, most first, then by name."""
    languages = found["languages"]
    return sorted(languages, key=lambda name: (-(languages[name]["pairs"] or 0), name))


def score_table(found: dict[str, Any]) -> Table:
    """The table for the terminal: a row per language and mean, a column per measure and system."""
    count = found["options"]["sentences"]
    table = Table(title=f"X -> English, {count} sentences per language: chrF (more is better), nats (less is better)")
    table.add_column("language")
    table.add_column("training pairs", justify="right")
    for measure in ("chrF", "nats"):
        for label in SYSTEMS.values():
            table.add_column(f"{measure}\n{label}", justify="right")
    for name in by_training_text(found):
        table.add_row(name, pairs_text(found["languages"][name]["pairs"]), *_cells(found, name))
    table.add_section()
    for group in (ALL_LANGUAGES, UNSEEN):
        if group in found["scores"]["llm"]:
            table.add_row(f"mean: {group}", "", *_cells(found, group))
    return table


def pairs_text(pairs: int | None) -> str:
    """The number of training pairs, for a table."""
    return "?" if pairs is None else "none" if pairs == 0 else f"{pairs:,}"


def _cells(found: dict[str, Any], name: str) -> list[str]:
    scores = [found["scores"][system][name] for system in SYSTEMS]
    cells = [f"{each['chrf']:.1f}" for each in scores], [f"{each['nats']:.2f}" for each in scores]
    best = max(scores, key=lambda each: each["chrf"]), min(scores, key=lambda each: each["nats"])
    return [
        f"[bold]{cell}[/bold]" if each is winner else cell
        for row, winner in zip(cells, best, strict=True)
        for cell, each in zip(row, scores, strict=True)
    ]
