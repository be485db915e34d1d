"""The pre-training of a seed, and a run: one system, trained and evaluated with one seed.

A run writes `result.json` last. A run that has one is not repeated; an interrupted run starts over.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from layalign.evaluation import evaluate
from layalign.experiments.controlled.settings import ExperimentSettings, System
from layalign.experiments.engine import RESULT, Watch, read_done, run_folder, write_done
from layalign.experiments.made_up.data_files import TEST, write_files
from layalign.experiments.made_up.parts import pretrain, train_stage
from layalign.experiments.made_up.pretraining import Budget, Progress
from layalign.modeling.model import LayAlignForCausalLM
from layalign.modeling.tokenization import load_tokenizers
from layalign.training.baselines import baseline
from layalign.utils.lock import LOCK, held

PREPARED = "prepared.json"


def seed_folder(folder: Path, seed: int) -> Path:
    """Folder of a seed's encoder and LLM."""
    return folder / "parts" / f"seed-{seed}"


def _empty(place: Path) -> None:
    """Remove what an interrupted run left in its folder, except the lock file."""
    for path in place.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


# A seed's data and models


def prepare(settings: ExperimentSettings, folder: Path, seed: int) -> dict[str, Any]:
    """Train tokenizers, LLM and encoder of a seed from scratch, unless that has been done."""
    place, mark = seed_folder(folder, seed), settings.fingerprint()
    with held(place, "output"):
        return read_done(place / PREPARED, mark) or _prepare(settings, place, seed, mark)


def _prepare(settings: ExperimentSettings, place: Path, seed: int, mark: str) -> dict[str, Any]:
    _empty(place)
    losses: dict[str, list[tuple[int, float]]] = {"llm": [], "encoder": []}
    seconds: dict[str, float] = {}

    @contextmanager
    def phase(name: str) -> Iterator[Progress]:
        def record(step: int, steps: int, loss: float) -> None:
            if step % 25 == 0 or step == steps:
                losses[name].append((step, round(loss, 4)))

        started = time.perf_counter()
        yield record
        seconds[name] = time.perf_counter() - started

    pretrain(place, settings, settings.weights(), settings.encoder_vocabulary, seed, phase)
    seconds["llm"] += seconds.pop("tokenizers")
    return write_done(place / PREPARED, mark, {"seed": seed, "seconds": seconds, "losses": losses})


# A run


def _stage(
    settings: ExperimentSettings, system: System, stage: str, place: Path, parts: Path, seed: int, before: Path | None
) -> dict[str, Any]:
    """Train one stage; returns its steps, seconds and losses."""
    budget: Budget = getattr(settings, stage)
    budget, watch = replace(budget, steps=system.steps(budget)), Watch()
    summary = train_stage(
        stage, budget, seed, watch, parts=parts, data=place / "data", output=place / stage, before=before,
        fields=system.model_settings, logging_steps=10, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    return {
        "steps": summary.steps,
        "examples": budget.steps * budget.batch,
        "seconds": round(watch.seconds, 2),
        "losses": watch.losses,
        "loss_after": summary.loss_after,
    }


def run(settings: ExperimentSettings, folder: Path, system_name: str, seed: int) -> dict[str, Any]:
    """Train and evaluate a system with a seed that has been prepared; returns the content of `result.json`."""
    system = settings.system(system_name)
    place, mark = run_folder(folder, system.name, seed), settings.fingerprint(system)
    with held(place, "output"):
        return read_done(place / RESULT, mark) or _run(settings, system, place, seed_folder(folder, seed), seed, mark)


def _run(
    settings: ExperimentSettings, system: System, place: Path, parts: Path, seed: int, mark: str
) -> dict[str, Any]:
    _empty(place)
    # Again for every run: old files may be incomplete.
    trained, tested = settings.trained_languages, settings.all_languages
    write_files(
        place / "data", settings, seed, translation=trained, task=trained, test=tested, questions=settings.questions
    )
    stages: dict[str, Any] = {}
    before: Path | None = None
    for stage in baseline(system.baseline).stages:
        stages[stage] = _stage(settings, system, stage, place, parts, seed, before)
        before = place / stage
    of_parts: dict[str, Any] = {"encoder": str(parts / "encoder"), "llm": str(parts / "llm")}
    if before is None:
        model = LayAlignForCausalLM.from_encoder_and_llm(**of_parts, **system.model_settings).eval()
    else:
        model = LayAlignForCausalLM.from_pretrained(before).eval()
    if torch.cuda.is_available():
        model.to("cuda")
    tokenizers = load_tokenizers(before, **of_parts)
    started = time.perf_counter()
    result = evaluate(
        model, *tokenizers, "mgsm", str(place / "data" / TEST), place / "evaluation",
        languages=settings.all_languages, batch_size=settings.questions, max_new_tokens=settings.max_new_tokens,
        resume=False,
    )  # fmt: skip
    found = {
        "system": system.name,
        "seed": seed,
        "stages": stages,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad) if stages else 0,
        "train_seconds": round(sum(stage["seconds"] for stage in stages.values()), 2),
        "evaluation_seconds": round(time.perf_counter() - started, 2),
        "scores": {name: {"correct": s.correct, "count": s.count} for name, s in result.scores.items()},
        "gates": [round(gate.item(), 4) for name, gate in model.named_parameters() if name.endswith("adaption_gate")],
    }
    return write_done(place / RESULT, mark, found)
