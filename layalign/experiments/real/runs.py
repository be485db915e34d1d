"""One run on the real pair: choose a learning rate, train a system with a seed, and test it.

A run writes ``trained.json`` after training and ``result.json`` after the test. A step whose file exists is not
repeated. An interrupted run resumes from its last checkpoint.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from layalign.data import Example
from layalign.evaluation.answering import LlmAnswers, ModelAnswers, llm_alone
from layalign.experiments.engine import RESULT, Watch, log, read_done, run_folder, write_done
from layalign.experiments.real.data import RealData, as_text
from layalign.experiments.real.measures import collators, measure
from layalign.experiments.real.settings import RealSettings, RealSystem, StageSettings
from layalign.modeling.model import LayAlignForCausalLM
from layalign.modeling.tokenization import encode_texts, load_tokenizers
from layalign.training import TrainConfig, train
from layalign.training.gates import FILE as GATES
from layalign.training.record import FILE as RECORD
from layalign.training.runs import RUN_FILE
from layalign.utils.errors import ArgumentError
from layalign.utils.lock import held
from layalign.utils.reading import read_json

CHOICE, TRAINED = "choice.json", "trained.json"
SAVE_STEPS = 50
LONGEST_PROMPT = 2048  # tokens; enough for five examples in a script that the LLM's tokenizer splits into bytes


def work_folder(folder: Path, system: str, seed: int, rate: float, suffix: str = "") -> Path:
    """Folder of a run's checkpoints."""
    return folder / "work" / system / f"seed-{seed}" / f"lr-{rate:g}{suffix}"


def named(file: str, suffix: str) -> str:
    """The name of a stage's file: "trained.json" with "-task" is "trained-task.json"."""
    return Path(file).stem + suffix + Path(file).suffix


@dataclass(frozen=True)
class Stage:
    """A training stage of one system.

    Attributes:
        suffix: suffix of its files' names; "" in the translation stage.
        system: the system.
        settings: settings of the stage.
        train, dev: the examples, as the system reads them.
        lengths: one number per training example to group batches by; the same for all systems.
        config: returns the training configuration for (seed, learning rate, folder, dtype).
        dtype: dtype of new runs.
        start: returns, for a seed, further arguments of ``train``: a model and its tokenizers, or none.
        mark: the fingerprint.
    """

    suffix: str
    system: RealSystem
    settings: StageSettings
    train: Sequence[Example]
    dev: Sequence[Example]
    lengths: Sequence[int]
    config: Callable[[int, float, Path, str], TrainConfig]
    dtype: str
    start: Callable[[int], dict[str, Any]]
    mark: str


def translation(settings: RealSettings, system: RealSystem, data: RealData) -> Stage:
    """The translation stage of a system."""
    own: dict[str, Any] = {
        "stage": "task" if system.reads_text else "translation", "max_target_length": settings.max_length,
        "max_prompt_length": settings.max_length + 8,
    }  # fmt: skip
    return Stage(
        "", system, settings, read_by(system, data.train), read_by(system, data.dev),
        token_counts(settings, data.train, settings.max_length),
        lambda *run: train_config(settings, settings, system, *run, **own),
        settings.dtype_of(system), lambda seed: {}, settings.fingerprint(system, data.mark),
    )  # fmt: skip


class _PauseAt(TrainerCallback):
    """Stops training after a step, with a checkpoint from which it can be resumed."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if self.step <= state.global_step < state.max_steps:
            control.should_save = control.should_evaluate = control.should_training_stop = True


def train_config(
    settings: RealSettings, budget: StageSettings, system: RealSystem, seed: int, rate: float, output: Path, dtype: str,
    **own: Any,
) -> TrainConfig:  # fmt: skip
    """The training configuration of a run, with those of the stage alone in `own`; everything else is as published."""
    weights = Path(settings.weights)
    return TrainConfig(
        encoder=str(weights / "encoder"), llm=str(weights / "llm"), output_dir=str(output),
        max_steps=system.steps(budget), learning_rate=rate, batch_size=budget.batch, micro_batch_size=budget.batch,
        eval_batch_size=budget.batch, max_source_length=budget.max_length, group_by_length=True,
        eval_steps=budget.eval_steps, save_steps=SAVE_STEPS, save_total_limit=1, logging_steps=5, spike_factor=0.0,
        seed=seed, progress=False, frozen_dtype=dtype, bf16=dtype == "bfloat16", use_cpu=not torch.cuda.is_available(),
        **own, **{"llm_bos_token_id": settings.llm_bos_token_id, **system.model_settings},
    )  # fmt: skip


def dtype_of(output: Path) -> str:
    """The dtype of the run in a folder."""
    record = read_json(output / RECORD, error=ArgumentError)
    return "bfloat16" if record["settings"]["bf16"] else "float32"


def _train(stage: Stage, folder: Path, seed: int, rate: float, until: int, dtype: str | None = None) -> dict[str, Any]:
    """Start or resume a run and train up to step `until`; returns its losses and settings up to there.

    A new run uses `dtype`, by default the stage's.

    Raises:
        ArgumentError: the run is beyond that step, and its dev loss there is not known.
    """
    output = work_folder(folder, stage.system.name, seed, rate, stage.suffix)
    done = read_json(output / RUN_FILE, error=ArgumentError) if (output / RUN_FILE).is_file() else {}
    dtype = dtype_of(output) if (output / RECORD).is_file() else dtype or stage.dtype
    if done.get("steps", 0) < until:
        watch = Watch(time.process_time)
        train(
            stage.config(seed, rate, output, dtype),
            examples=stage.train,
            dev_examples=stage.dev,
            lengths=stage.lengths,
            callbacks=[watch, _PauseAt(until)],
            **stage.start(seed),
        )
        done = read_json(output / RUN_FILE, error=ArgumentError)
        of_run = {"system": stage.system.name, "seed": seed, "rate": rate}
        log(folder, "steps", **of_run, steps=watch.steps, cpu_seconds=round(watch.seconds))
    losses = {
        # A dict by step, because the end of a run is measured twice.
        key: [[step, loss] for step, loss in by_step.items() if step <= until]
        for key in ("loss", "eval_loss")
        for by_step in [{e["step"]: round(e[key], 5) for e in done["log_history"] if key in e}]
    }
    if losses["eval_loss"][-1][0] != until:
        raise ArgumentError(f"output: {output} is at step {done['steps']}; its dev loss at step {until} is not known")
    return {
        "learning_rate": rate,
        "dtype": dtype,
        "steps": until,
        "dev_loss": losses["eval_loss"][-1][1],
        "losses": losses["loss"],
        "dev_losses": losses["eval_loss"],
        "trained_parameters": done["trained_parameters"],
        "cut": done["cut"],
    }


def token_counts(settings: RealSettings, pairs: Sequence[Example], longest: int) -> list[int]:
    """Encoder and LLM tokens of each pair. All systems use the same numbers, and so the same batches."""
    counts = [0] * len(pairs)
    texts = [pair.source for pair in pairs], [pair.target for pair in pairs]
    for tokenizer, of in zip(tokenizers_of(settings), texts, strict=True):
        rows = encode_texts(tokenizer, of, longest=longest)
        counts = [count + len(row.ids) for count, row in zip(counts, rows, strict=True)]
    return counts


def tokenizers_of(settings: RealSettings) -> tuple[Any, Any]:
    """The tokenizers of the encoder and of the LLM."""
    weights = Path(settings.weights)
    return load_tokenizers(None, encoder=str(weights / "encoder"), llm=str(weights / "llm"))


def read_by(system: RealSystem, pairs: Sequence[Example]) -> list[Example]:
    """The pairs as a trained system reads them."""
    return as_text(pairs) if system.reads_text else list(pairs)


def choose_rate(stage: Stage, folder: Path) -> dict[str, Any]:
    """Choose the learning rate with the lowest dev loss after ``choice_steps``.

    The runs use the first seed, and the run with the chosen rate is later resumed.
    """
    path = folder / "runs" / stage.system.name / named(CHOICE, stage.suffix)
    with held(path.parent, "output"):
        if (done := read_done(path, stage.mark)) is not None:
            return done
        tried, rates = {}, stage.settings.rates_of(stage.system)
        first = stage.settings.seeds_of(stage.system)[0]
        for rate in rates:
            log(folder, f"choice{stage.suffix}", system=stage.system.name, rate=rate)
            found = _train(stage, folder, first, rate, stage.settings.choice_steps)
            tried[f"{rate:g}"] = {key: found[key] for key in ("dtype", "dev_loss", "dev_losses", "losses")}
        chosen = min(rates, key=lambda rate: tried[f"{rate:g}"]["dev_loss"])
        return write_done(path, stage.mark, {"system": stage.system.name, "chosen": chosen, "tried": tried})


def train_run(stage: Stage, folder: Path, seed: int) -> dict[str, Any]:
    """Train a system with a seed, at its chosen learning rate."""
    name, place = stage.system.name, run_folder(folder, stage.system.name, seed)
    rate = choose_rate(stage, folder)["chosen"]
    with held(place, "output"):
        path = place / named(TRAINED, stage.suffix)
        if (done := read_done(path, stage.mark)) is not None:
            return done
        log(folder, f"train{stage.suffix}", system=name, seed=seed, rate=rate)
        found = _train(stage, folder, seed, rate, stage.system.steps(stage.settings))
        gates = work_folder(folder, name, seed, rate, stage.suffix) / GATES
        if gates.is_file():  # systems without an aligner have none
            shutil.copyfile(gates, place / named(GATES, stage.suffix))
        return write_done(path, stage.mark, {"system": name, "seed": seed, **found})


def trained_folder(stage: Stage, folder: Path, seed: int) -> Path:
    """Folder of a run's trained weights; trained again if only its small files exist, as in a clone."""
    done = train_run(stage, folder, seed)
    rate = done["learning_rate"]
    with held(run_folder(folder, stage.system.name, seed), "output"):
        # This does nothing if the weights exist.
        _train(stage, folder, seed, rate, stage.system.steps(stage.settings), done["dtype"])
    return work_folder(folder, stage.system.name, seed, rate, stage.suffix)


def load_run(checkpoint: Path, dtype: str | None = None, **config: Any) -> LayAlignForCausalLM:
    """The model of a trained run, by default in the run's dtype. `config` overrides fields of its configuration."""
    kwargs = {"dtype": dtype or dtype_of(checkpoint)}
    model = LayAlignForCausalLM.from_pretrained(checkpoint, encoder_kwargs=kwargs, llm_kwargs=kwargs, **config)
    return model.eval()


def load_llm_alone(settings: RealSettings, system: RealSystem) -> Any:
    """The LLM of a system without training."""
    place = Path(settings.weights) / "llm"
    return AutoModelForCausalLM.from_pretrained(place, dtype=settings.dtype_of(system)).eval()


def test_run(settings: RealSettings, system: RealSystem, data: RealData, folder: Path, seed: int) -> dict[str, Any]:
    """Test a system, after training it if necessary; returns the values of every sentence."""

    def tested(checkpoint: Path | None) -> dict[str, Any]:
        started = time.process_time()
        domains = {"tatoeba": data.test, "ntrex": data.other_domain}
        found: dict[str, Any] = {domain: {} for domain in domains}
        answers, collator = asked(settings, system, data, checkpoint)
        shown = {shot.language for group in data.shots.values() for shot in group}
        for domain, groups in domains.items():
            for code, pairs in groups.items():
                if system.shots and pairs[0].language not in shown:
                    continue
                read = pairs if system.shots else read_by(system, pairs)
                found[domain][code] = measure(settings, answers, collator, read, domain == "tatoeba")
        return {**found, "cpu_seconds": round(time.process_time() - started)}

    return after_training(settings, system, data, folder, seed, RESULT, "test", tested, indent=None)


def after_training(
    settings: RealSettings, system: RealSystem, data: RealData, folder: Path, seed: int, file: str, event: str,
    work: Callable[[Any], dict[str, Any]], indent: int | None = 1,
) -> dict[str, Any]:  # fmt: skip
    """The content of a run's ``file``; if it does not exist, ``work`` computes it (see :func:`after`)."""
    mark = settings.test_fingerprint(system, data.test_mark)
    path = run_folder(folder, system.name, seed) / file
    return after(lambda: translation(settings, system, data), folder, seed, system, path, mark, event, work, indent)


def after(
    stage: Callable[[], Stage], folder: Path, seed: int, system: RealSystem, path: Path, mark: str, event: str,
    work: Callable[[Any], dict[str, Any]], indent: int | None,
) -> dict[str, Any]:  # fmt: skip
    """The content of a file that is computed after a stage, if it does not exist.

    Args:
        stage: returns the stage.
        folder, seed, system: the run.
        path, mark, indent: the file, its fingerprint, and the indentation of its JSON.
        event: name of the event in the log.
        work: gets the folder of the trained weights, or None for a system without training.
    """
    if (done := read_done(path, mark)) is not None:
        return done
    checkpoint = trained_folder(stage(), folder, seed) if system.trains else None
    with held(path.parent, "output"):
        log(folder, event, system=system.name, seed=seed)
        return write_done(path, mark, {"system": system.name, "seed": seed, **work(checkpoint)}, indent)


def asked(
    settings: RealSettings, system: RealSystem, data: RealData, checkpoint: Path | None
) -> tuple[ModelAnswers | LlmAnswers, Any]:
    """(what writes translations, the collator for likelihoods); the LLM alone if there is no checkpoint."""
    tokenizers = tokenizers_of(settings)
    if checkpoint is None:
        llm = load_llm_alone(settings, system)
        shots = [shot for group in data.shots.values() for shot in group[: system.shots]]
        alone = llm_alone(
            llm, tokenizers[1], examples=shots, max_new_tokens=settings.max_new_tokens, max_prompt_length=LONGEST_PROMPT
        )
        return alone, alone.collator
    model = load_run(checkpoint)
    likely, writes = collators(model, tokenizers, "task" if system.reads_text else "translation")
    return ModelAnswers(model, writes, settings.max_new_tokens), likely
