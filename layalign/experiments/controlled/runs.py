"""The pre-training of a seed, and a run: one system, trained and evaluated with one seed.

A run writes `result.json` last. A run that has one is not repeated; an interrupted run starts over.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from layalign.evaluation import evaluate
from layalign.experiments.controlled.settings import ExperimentSettings, Steps, System
from layalign.experiments.engine import RESULT, Watch, read_done, run_folder, write_done
from layalign.experiments.made_up.data_files import MATH, TEST, TRANSLATION, tokenizer_texts, write_files
from layalign.experiments.made_up.pretraining import encoder_config, llm_config, pretrain_encoder, pretrain_llm
from layalign.experiments.made_up.vocabulary import train_encoder_tokenizer, train_llm_tokenizer
from layalign.modeling.model import LayAlignForCausalLM
from layalign.modeling.tokenization import load_tokenizers
from layalign.training import TrainConfig, train
from layalign.training.baselines import baseline
from layalign.utils.files import give_usual_modes
from layalign.utils.lock import LOCK, held

PREPARED = "prepared.json"
_FILES = {"translation": TRANSLATION, "task": MATH}


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


def _every(losses: list[tuple[int, float]], interval: int) -> Callable[[int, int, float], None]:
    def record(step: int, steps: int, loss: float) -> None:
        if step % interval == 0 or step == steps:
            losses.append((step, round(loss, 4)))

    return record


def prepare(settings: ExperimentSettings, folder: Path, seed: int) -> dict[str, Any]:
    """Train tokenizers, LLM and encoder of a seed from scratch, unless that has been done."""
    place, mark = seed_folder(folder, seed), settings.fingerprint()
    with held(place, "output"):
        return read_done(place / PREPARED, mark) or _prepare(settings, place, seed, mark)


def _prepare(settings: ExperimentSettings, place: Path, seed: int, mark: str) -> dict[str, Any]:
    _empty(place)
    started, languages = time.perf_counter(), settings.all_languages
    llm_tokenizer = train_llm_tokenizer(tokenizer_texts("English", 2000, seed, answers=True))
    texts = [text for name in languages for text in tokenizer_texts(name, 800, seed)]
    encoder_tokenizer = train_encoder_tokenizer(texts, settings.encoder_vocabulary)
    losses: dict[str, list[tuple[int, float]]] = {"llm": [], "encoder": []}
    seconds = {}
    shape = llm_config(llm_tokenizer, settings.llm_size, settings.llm_layers)
    llm = pretrain_llm(llm_tokenizer, settings.llm, seed, _every(losses["llm"], 25), shape)
    seconds["llm"] = time.perf_counter() - started
    wide = encoder_config(encoder_tokenizer, settings.encoder_size, settings.encoder_layers)
    encoder = pretrain_encoder(
        encoder_tokenizer,
        settings.encoder,
        seed,
        _every(losses["encoder"], 25),
        settings.weights(),
        config=wide,
    )
    seconds["encoder"] = time.perf_counter() - started - seconds["llm"]
    for name, model, tokenizer in (("llm", llm, llm_tokenizer), ("encoder", encoder, encoder_tokenizer)):
        model.save_pretrained(place / name)
        give_usual_modes(place / name)
        tokenizer.save_pretrained(place / name)
    return write_done(place / PREPARED, mark, {"seed": seed, "seconds": seconds, "losses": losses})


def _write_data(settings: ExperimentSettings, place: Path, seed: int) -> None:
    """Write the texts of both stages and the test questions, again for every run: old files may be incomplete."""
    count = {name: getattr(settings, name).steps * getattr(settings, name).batch for name in ("translation", "task")}
    write_files(
        place,
        seed,
        translation=(settings.trained_languages, count["translation"]),
        task=(settings.trained_languages, count["task"]),
        test=(settings.all_languages, settings.questions, settings.split),
    )


# A run


def _stage(
    settings: ExperimentSettings,
    system: System,
    stage: str,
    place: Path,
    data: Path,
    parts: Path,
    seed: int,
    before: Any,
) -> dict[str, Any]:
    """Train one stage; returns its steps, seconds and losses."""
    budget: Steps = getattr(settings, stage)
    steps = system.steps(budget)
    start: dict[str, Any] = {"init_checkpoint": before}
    if before is None:
        start = {"encoder": str(parts / "encoder"), "llm": str(parts / "llm")}
        start.update(system.model_settings)
    config = TrainConfig(
        stage=stage, task="math", data=str(data / _FILES[stage]), output_dir=str(place / stage), max_steps=steps,
        batch_size=budget.batch, micro_batch_size=budget.batch, learning_rate=budget.learning_rate, adam_beta1=0.9,
        dev_size=0, eval_steps=0, save_steps=0, logging_steps=10, group_by_length=True, seed=seed,
        use_cpu=not torch.cuda.is_available(), bf16=False, resume=False, progress="quiet", **start,
    )  # fmt: skip
    watch = Watch()
    summary = train(config, callbacks=[watch])
    return {
        "steps": summary.steps,
        "examples": steps * budget.batch,
        "seconds": round(watch.seconds, 2),
        "losses": watch.losses,
        "loss_after": summary.loss_after,
    }


def _model(system: System, parts: Path, place: Path, last: str | None) -> LayAlignForCausalLM:
    """The model to evaluate: the checkpoint of the last stage, or the untrained model."""
    if last is not None:
        return LayAlignForCausalLM.from_pretrained(place / last).eval()
    return LayAlignForCausalLM.from_encoder_and_llm(
        str(parts / "encoder"), str(parts / "llm"), **system.model_settings
    ).eval()


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
    _write_data(settings, place / "data", seed)
    stages: dict[str, Any] = {}
    before: str | None = None
    for stage in baseline(system.baseline).stages:
        stages[stage] = _stage(settings, system, stage, place, place / "data", parts, seed, before)
        before = str(place / stage)
    model = _model(system, parts, place, next(reversed(stages), None))
    if torch.cuda.is_available():
        model.to("cuda")
    tokenizers = load_tokenizers(before, encoder=str(parts / "encoder"), llm=str(parts / "llm"))
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
