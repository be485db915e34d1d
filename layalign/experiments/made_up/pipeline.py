"""`layalign demo --made-up`: data, two pre-trainings, both stages for two systems, evaluation of three, report."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from layalign.evaluation import EvaluationResult, evaluate, llm_alone
from layalign.experiments.made_up.data_files import TEST, write_files
from layalign.experiments.made_up.parts import pretrain, train_stage
from layalign.experiments.made_up.pretraining import Progress, demo_weights
from layalign.experiments.made_up.problems import LANGUAGES, LOW_RESOURCE
from layalign.experiments.made_up.settings import DemoSettings
from layalign.experiments.pages import terminal_table
from layalign.experiments.progress import Phases, StepCallback
from layalign.modeling.model import LayAlignForCausalLM
from layalign.utils.files import write_whole
from layalign.utils.lock import held

# The systems and their names in tables. The adapter alone has no aligner and no gates.
SYSTEMS = {"llm": "LLM alone", "adapter": "last-layer adapter alone", "layalign": "LayAlign"}
_MAX_NEW_TOKENS = 48
_VOCABULARY = 1600  # of the encoder


@dataclass
class Demo:
    """State of a run: settings, output folder, and results so far."""

    folder: Path
    settings: DemoSettings
    seed: int
    phases: Phases
    losses: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    results: dict[str, EvaluationResult] = field(default_factory=dict)


def run_demo(
    output_dir: str | Path,
    seed: int = 0,
    *,
    fast: bool = False,
    settings: DemoSettings | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Run the demo and write models, data, predictions, `results.json`, `report.html` and `report.md`.

    Args:
        output_dir: folder for everything; created if needed. Files of an earlier run are replaced.
        seed: seed of data, models and training.
        fast: use tiny sizes, only to see it run.
        settings: other sizes; overrides `fast`.
        progress: show progress bars and the table.

    Returns:
        The content of `results.json`.

    Raises:
        ArgumentError: another run is writing into `output_dir`.
    """
    chosen = settings or (DemoSettings.fast() if fast else DemoSettings())
    with held(output_dir):
        return _run(Demo(Path(output_dir), chosen, seed, Phases(Console(), progress)))


def _run(demo: Demo) -> dict[str, Any]:
    from layalign.experiments.made_up.report import write_report

    with demo.phases.phase("data"):
        languages = [language for language in LANGUAGES if language != "English"]
        counts = write_files(
            demo.folder / "data", demo.settings, demo.seed, translation=languages, task=demo.settings.task_languages,
            test=LANGUAGES, questions=demo.settings.problems_per_language,
        )  # fmt: skip
    llm_tokenizer, encoder_tokenizer = _pretrain(demo)
    trained = {name: _train(demo, name) for name in ("adapter", "layalign")}
    _evaluate_all(demo, trained, (encoder_tokenizer, llm_tokenizer))
    with demo.phases.phase("report"):
        found = _found(demo, counts, trained["layalign"])
        write_report(demo.folder, found)
    found["seconds"] = demo.phases.seconds
    write_whole(demo.folder / "results.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    if demo.phases.shown:
        demo.phases.console.print(result_table(found))
        total = sum(demo.phases.seconds.values())
        demo.phases.console.print(f"{total:.0f} s in total; report: {demo.folder / 'report.html'}")
    return found


# Pre-training


@contextmanager
def _phase(demo: Demo, name: str, losses: str) -> Iterator[Progress]:
    """A phase of training, whose losses are recorded."""
    with demo.phases.phase(name) as show:

        def record(step: int, steps: int, loss: float) -> None:
            demo.losses.setdefault(losses, []).append((step, loss))
            show(step, steps, loss)

        yield record


def _pretrain(demo: Demo) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """Train tokenizers and models, saved to `llm/` and `encoder/`; returns the tokenizers of (LLM, encoder)."""
    names = {
        "tokenizers": ("tokenizers", ""),
        "llm": ("LLM, English only", "LLM"),
        "encoder": ("encoder, all languages", "encoder"),
    }
    weights = demo_weights(demo.settings.low_resource_share)
    return pretrain(
        demo.folder, demo.settings, weights, _VOCABULARY, demo.seed, lambda name: _phase(demo, *names[name])
    )


# LayAlign


def _train(demo: Demo, system: str) -> LayAlignForCausalLM:
    """Train both stages of a system with the library's `train`, from the files."""
    checkpoint = None
    for stage, budget in (("translation", demo.settings.translation), ("task", demo.settings.task)):
        label, output = f"{SYSTEMS[system]}, {stage}", demo.folder / system / stage
        with _phase(demo, label, label) as record:
            train_stage(
                stage, budget, demo.seed, StepCallback(record), parts=demo.folder, data=demo.folder / "data",
                output=output, before=checkpoint, fields={"language_layers": [] if system == "adapter" else None},
                logging_steps=5, use_cpu=True,
            )  # fmt: skip
        checkpoint = output
    return LayAlignForCausalLM.from_pretrained(checkpoint).eval()


# Evaluation


def _evaluate_all(
    demo: Demo,
    trained: dict[str, LayAlignForCausalLM],
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
) -> None:
    encoder_tokenizer, llm_tokenizer = tokenizers
    llm = transformers.AutoModelForCausalLM.from_pretrained(demo.folder / "llm").eval()
    answerers: dict[str, Any] = {"llm": llm_alone(llm, llm_tokenizer, max_new_tokens=_MAX_NEW_TOKENS), **trained}
    for name, label in SYSTEMS.items():
        with demo.phases.phase(f"evaluation, {label}"):
            demo.results[name] = evaluate(
                answerers[name], encoder_tokenizer, llm_tokenizer, "mgsm", str(demo.folder / "data" / TEST),
                demo.folder / "evaluation" / name, languages=LANGUAGES, batch_size=48, max_new_tokens=_MAX_NEW_TOKENS,
                resume=False,
            )  # fmt: skip


# Results


def _found(demo: Demo, counts: dict[str, int], model: LayAlignForCausalLM) -> dict[str, Any]:
    """Everything that the report needs, as JSON values."""
    scores = {name: result.to_dict()["languages"] for name, result in demo.results.items()}
    layers = model.config.encoder_layers or []
    return {
        "seed": demo.seed,
        "settings": asdict(demo.settings),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "lines": counts,
        "languages": list(LANGUAGES),
        "low_resource": list(LOW_RESOURCE),
        "held_out_of_task": [name for name in LANGUAGES if name not in demo.settings.task_languages],
        "scores": scores,
        "averages": {name: averages(languages, demo.settings.task_languages) for name, languages in scores.items()},
        "losses": demo.losses,
        "gates": [gate.item() for name, gate in model.named_parameters() if name.endswith("adaption_gate")],
        "mix_weights": model.encoder_aligner.projector.fc1.weight.detach().tolist() if model.encoder_aligner else [],
        "encoder_layers": list(layers),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "frozen_parameters": sum(p.numel() for p in model.parameters() if not p.requires_grad),
        "seconds": dict(demo.phases.seconds),
    }


def averages(scores: dict[str, dict[str, Any]], task_languages: tuple[str, ...]) -> dict[str, float]:
    """Mean accuracies of a system over groups of languages."""
    groups: dict[str, Callable[[str], bool]] = {
        "all": lambda name: True,
        "low-resource": lambda name: name in LOW_RESOURCE,
        "trained in the task stage": lambda name: name in task_languages,
        "held out of it": lambda name: name not in task_languages and name != "English",
    }
    means = {}
    for group, belongs in groups.items():
        found = [score["accuracy"] for name, score in scores.items() if belongs(name)]
        means[group] = sum(found) / len(found)
    return means


def result_table(found: dict[str, Any]) -> Any:
    """The table for the terminal: a row per language and average, a column per system."""
    settings = found["settings"]
    title = f"accuracy %, {settings['problems_per_language']} {settings['split']} problems per language"
    return terminal_table(f"{title}, seed {found['seed']}", [["language", *SYSTEMS.values()], *table_rows(found)])


def table_rows(found: dict[str, Any]) -> list[list[str]]:
    """Rows of the result table: name, then one cell per system. `*` marks low-resource, `+` not in the task stage."""
    rows = []
    for name in found["languages"]:
        marks = ("*" if name in found["low_resource"] else "") + ("+" if name in found["held_out_of_task"] else "")
        rows.append([f"{name} {marks}".strip(), *(f"{found['scores'][s][name]['accuracy']:.1f}" for s in SYSTEMS)])
    for group in found["averages"]["layalign"]:
        rows.append([f"average: {group}", *(f"{found['averages'][s][group]:.1f}" for s in SYSTEMS)])
    return rows
