"""One run on the real pair: a learning rate chosen, a system trained with a seed, and what it then does on test text.

What a run leaves that others need are two small files and its trained weights: ``trained.json`` after training,
``result.json`` after the test. What has one is not done again; a run that was cut off goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from layalign import LayAlignForCausalLM
from layalign._files import write_whole
from layalign._lock import held
from layalign.data import Example
from layalign.evaluation.answering import LlmAnswers, ModelAnswers, llm_alone
from layalign.experiment.runs import log, read_done, versions
from layalign.experiments.real.data import RealData, as_text
from layalign.experiments.real.measures import collators, measure
from layalign.experiments.real.settings import RealSettings, RealSystem
from layalign.tokenization import encode_texts, load_tokenizers
from layalign.training import TrainConfig, train

CHOICE, TRAINED, RESULT = "choice.json", "trained.json", "result.json"
SAVE_STEPS = 50


def run_folder(folder: Path, system: str, seed: int) -> Path:
    """Where a run's small files are."""
    return folder / "runs" / system / f"seed-{seed}"


def work_folder(folder: Path, system: str, seed: int, rate: float) -> Path:
    """Where a run's checkpoints are."""
    return folder / "work" / system / f"seed-{seed}" / f"lr-{rate:g}"


class _PauseAt(TrainerCallback):
    """Ends training after a step, with a checkpoint from which it goes on as if it had not ended."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step == self.step < state.max_steps:
            control.should_save = control.should_evaluate = control.should_training_stop = True


class _Seconds(TrainerCallback):
    """Counts the seconds of the steps alone, without loading and evaluation."""

    def __init__(self) -> None:
        self.steps, self.seconds = 0, 0.0

    def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self._started = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.steps, self.seconds = self.steps + 1, self.seconds + time.process_time() - self._started


def train_config(settings: RealSettings, system: RealSystem, seed: int, rate: float, output: Path) -> TrainConfig:
    """The training configuration of a run; what is not named here is as published."""
    weights = Path(settings.weights)
    return TrainConfig(
        encoder=str(weights / "encoder"), llm=str(weights / "llm"), output_dir=str(output),
        stage="task" if system.reads_text else "translation", max_steps=settings.steps, learning_rate=rate,
        batch_size=settings.batch, micro_batch_size=settings.batch, eval_batch_size=settings.batch,
        max_source_length=settings.max_length, max_target_length=settings.max_length,
        max_prompt_length=settings.max_length + 8, group_by_length=True, eval_steps=settings.eval_steps,
        save_steps=SAVE_STEPS, save_total_limit=1, logging_steps=5, spike_factor=0.0, seed=seed,
        frozen_dtype=settings.dtype, bf16=settings.dtype == "bfloat16", use_cpu=not torch.cuda.is_available(),
        progress=False, **system.model_settings,
    )  # fmt: skip


def _train(
    settings: RealSettings, system: RealSystem, data: RealData, folder: Path, seed: int, rate: float, until: int
) -> dict[str, Any]:
    """Train up to a step of the schedule, from where the run's folder stands."""
    output = work_folder(folder, system.name, seed, rate)
    watch = _Seconds()
    summary = train(
        train_config(settings, system, seed, rate, output),
        examples=_read_by(system, data.train),
        dev_examples=_read_by(system, data.dev),
        lengths=_lengths(settings, data.train),
        callbacks=[watch, _PauseAt(until)],
    )
    history = summary.log_history
    losses = {
        # By step: the end of a run is measured twice.
        key: [[step, loss] for step, loss in {e["step"]: round(e[key], 5) for e in history if key in e}.items()]
        for key in ("loss", "eval_loss")
    }
    return {
        "learning_rate": rate,
        "steps": summary.steps,
        "dev_loss": summary.loss_after,
        "losses": losses["loss"],
        "dev_losses": losses["eval_loss"],
        "trained_parameters": summary.trained_parameters,
        "cut": summary.cut,
        "cpu_seconds_of_a_step": round(watch.seconds / watch.steps, 3) if watch.steps else None,
    }


def _lengths(settings: RealSettings, pairs: Sequence[Example]) -> list[int]:
    """Tokens of encoder and LLM of each pair, the same numbers for every system, so that all make the same batches."""
    weights, counts = Path(settings.weights), [0] * len(pairs)
    tokenizers = load_tokenizers(None, encoder=str(weights / "encoder"), llm=str(weights / "llm"))
    for tokenizer, texts in zip(tokenizers, ([p.source for p in pairs], [p.target for p in pairs]), strict=True):
        rows = encode_texts(tokenizer, texts, longest=settings.max_length)
        counts = [count + len(row.ids) for count, row in zip(counts, rows, strict=True)]
    return counts


def _read_by(system: RealSystem, pairs: Sequence[Example]) -> list[Example]:
    return as_text(pairs) if system.reads_text else list(pairs)


def choose_rate(settings: RealSettings, system: RealSystem, data: RealData, folder: Path) -> dict[str, Any]:
    """The learning rate with the lowest dev loss after ``choice_steps``; with the first seed, whose run goes on."""
    path, mark = folder / "runs" / system.name / CHOICE, settings.fingerprint(system, data.mark)
    with held(path.parent, "output"):
        if (done := read_done(path, mark)) is not None:
            return done
        seed, tried = settings.seeds_of(system)[0], {}
        for rate in settings.learning_rates:
            log(folder, "choice", system=system.name, rate=rate)
            found = _train(settings, system, data, folder, seed, rate, settings.choice_steps)
            tried[f"{rate:g}"] = {
                "dev_loss": found["dev_loss"],
                "dev_losses": found["dev_losses"],
                "losses": found["losses"],
            }
        chosen = min(settings.learning_rates, key=lambda rate: tried[f"{rate:g}"]["dev_loss"])
        return _done(path, mark, {"system": system.name, "chosen": chosen, "tried": tried})


def train_run(settings: RealSettings, system: RealSystem, data: RealData, folder: Path, seed: int) -> dict[str, Any]:
    """Train a system with a seed, at its chosen learning rate."""
    place, mark = run_folder(folder, system.name, seed), settings.fingerprint(system, data.mark)
    rate = choose_rate(settings, system, data, folder)["chosen"]
    with held(place, "output"):
        if (done := read_done(place / TRAINED, mark)) is not None:
            return done
        log(folder, "train", system=system.name, seed=seed, rate=rate)
        found = _train(settings, system, data, folder, seed, rate, settings.steps)
        work = work_folder(folder, system.name, seed, rate)
        for name in ("gates.jsonl", "training_config.yaml"):
            if (work / name).is_file():
                shutil.copy2(work / name, place / name)
        return _done(place / TRAINED, mark, {"system": system.name, "seed": seed, **found})


def load_run(settings: RealSettings, system: RealSystem, folder: Path, seed: int, rate: float) -> LayAlignForCausalLM:
    """The model of a trained run."""
    kwargs = {"dtype": settings.dtype}
    checkpoint = work_folder(folder, system.name, seed, rate)
    return LayAlignForCausalLM.from_pretrained(checkpoint, encoder_kwargs=kwargs, llm_kwargs=kwargs).eval()


def test_run(settings: RealSettings, system: RealSystem, data: RealData, folder: Path, seed: int) -> dict[str, Any]:
    """What a system does on the test sentences, trained before where it trains; every sentence's values."""
    mark = settings.test_fingerprint(system, data.test_mark)
    rate = train_run(settings, system, data, folder, seed)["learning_rate"] if system.trains else None
    place = run_folder(folder, system.name, seed)
    with held(place, "output"):
        if (done := read_done(place / RESULT, mark)) is not None:
            return done
        log(folder, "test", system=system.name, seed=seed)
        started = time.process_time()
        domains = {"tatoeba": data.test, "ntrex": data.other_domain}
        found: dict[str, Any] = {domain: {} for domain in domains}
        answers, collator = _asked(settings, system, data, folder, seed, rate)
        for domain, groups in domains.items():
            for code, pairs in groups.items():
                if system.shots and code not in data.shots:
                    continue
                read = pairs if system.shots else _read_by(system, pairs)
                found[domain][code] = measure(settings, answers, collator, read, domain == "tatoeba")
        found["cpu_seconds"] = round(time.process_time() - started)
        return _done(place / RESULT, mark, {"system": system.name, "seed": seed, **found}, indent=None)


def _asked(
    settings: RealSettings, system: RealSystem, data: RealData, folder: Path, seed: int, rate: float | None
) -> tuple[ModelAnswers | LlmAnswers, Any]:
    """(what writes, the collator of likelihoods)."""
    weights = Path(settings.weights)
    tokenizers = load_tokenizers(None, encoder=str(weights / "encoder"), llm=str(weights / "llm"))
    if rate is None:
        llm = AutoModelForCausalLM.from_pretrained(weights / "llm", dtype=settings.dtype).eval()
        shots = [shot for group in data.shots.values() for shot in group[: system.shots]]
        alone = llm_alone(llm, tokenizers[1], examples=shots, max_new_tokens=settings.max_new_tokens)
        return alone, alone.collator
    model = load_run(settings, system, folder, seed, rate)
    likely, writes = collators(model, tokenizers, "task" if system.reads_text else "translation", 256)
    return ModelAnswers(model, writes, settings.max_new_tokens), likely


def _done(path: Path, mark: str, found: dict[str, Any], indent: int | None = 1) -> dict[str, Any]:
    content = {"fingerprint": mark, **found, "versions": versions()}
    write_whole(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")
    return content
