"""Two-stage training on transformers' Trainer: translation (X -> English), then the task.

Source: the two training stages of LayAlign; the defaults (`layalign.training.config`) are those of its scripts.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments, __version__, set_seed
from transformers.integrations import TensorBoardCallback

from layalign.data import FORMATS, Example, LayAlignCollator, load_examples
from layalign.data.sentences import apart_from, cut_by_sentence
from layalign.modeling.checkpoint import OWN_PARTS
from layalign.modeling.configuration import LayAlignConfig, number_of_layers
from layalign.modeling.layers import named_layers
from layalign.modeling.model import LayAlignForCausalLM
from layalign.modeling.parts import matching_adapter_size
from layalign.modeling.tokenization import first_token, load_tokenizer, load_tokenizers
from layalign.training import precision, record, runs
from layalign.training.advice import SmallRun
from layalign.training.config import TrainConfig, require_config
from layalign.training.console import ConsoleLines
from layalign.training.gates import GateHistory
from layalign.training.guard import StepGuard
from layalign.training.launch import LossBefore, leave_engine, sharding_arguments, with_kept_micro_batch
from layalign.training.runs import is_main_process
from layalign.training.trainer import LayAlignTrainer
from layalign.utils.errors import ArgumentError, CheckpointError, StoppedError
from layalign.utils.files import writing

logger = logging.getLogger("layalign.training")

MEASURED = 200
# The keys that an init_checkpoint decides.
_SHAPE = (
    "encoder_layers", "language_layers", "structure", "mix", "use_adapter", "adapter_size", "adapter_fusion",
    "use_prompt", "fixed_gate",
)  # fmt: skip


@dataclass(frozen=True)
class TrainSummary:
    """Result of a stage. Losses are means per target token on the dev split, or on a fixed part of the training set.

    `cut` counts, over all epochs and evaluations, the "examples" read, those whose "source", "prompt" or "target" was
    truncated, and those that exceeded the LLM's positions ("context").
    """

    loss_before: float
    loss_after: float
    steps: int
    output_dir: str
    seconds: float
    trained_parameters: int
    total_parameters: int
    train_examples: int
    dev_examples: int
    resumed_from: str | None = None
    skipped_steps: list[int] = field(default_factory=list)
    loss_spikes: list[int] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)
    log_history: list[dict[str, Any]] = field(default_factory=list, repr=False)


def train(
    config: TrainConfig,
    *,
    model: LayAlignForCausalLM | None = None,
    encoder_tokenizer: Any = None,
    llm_tokenizer: Any = None,
    examples: Sequence[Example] | None = None,
    dev_examples: Sequence[Example] | None = None,
    lengths: Sequence[int] | None = None,
    callbacks: Sequence[Any] = (),
) -> TrainSummary:
    """Run one stage and write model, tokenizers, configuration and `training.json` to `config.output_dir`.

    Args:
        config: all settings.
        model, encoder_tokenizer, llm_tokenizer: objects to use instead of loading what `config` names. The model is
            trained in place.
        examples: training examples to use instead of `config.data`. Without `dev_examples` and `config.dev_data` the
            dev split is cut from them.
        dev_examples: dev split to use instead of `config.dev_data`; `config.dev_size` is ignored then.
        lengths: one number per training example for `group_by_length`. Default: the number of its tokens for the LLM.
        callbacks: transformers TrainerCallbacks.

    Raises:
        ArgumentError: the configuration contradicts itself, the data or an earlier run in the same folder; or another
            run is writing into that folder.
        DataError: the data cannot be read.
        CheckpointError: `init_checkpoint` or the checkpoint to resume from cannot be used.
        NonFiniteError: a loss or gradient is NaN or infinite, and `max_skipped_steps` steps have been skipped.
        OutputError: the disk is full, or a file cannot be written for another reason; existing checkpoints stay intact.
        StoppedError: SIGTERM was received; the step was finished and a checkpoint was written.
    """
    require_config(config)
    with runs.alone_in(config.output_dir):
        started = time.perf_counter()
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        resume_from = runs.find_resume(config)
        overwritten, earlier = record.overwritten(config, resume_from), None
        if resume_from is not None:
            earlier = record.earlier(resume_from, resume_from.parent / record.SETTINGS)
        asked, config = config, record.settled(config, earlier or overwritten, model)
        running = config
        if resume_from is not None and earlier is not None:
            known = {**runs.read_run(resume_from.parent), **record.micro_batch(earlier)}
            running = with_kept_micro_batch(config, known, world_size)
        micro, _ = running.batch_plan(world_size)
        if examples is None:
            examples = read_examples(config)
        if dev_examples is None and config.dev_data is not None:
            dev_examples = read_dev_examples(config)
        train_set, dev_set = _split(config, list(examples), dev_examples)
        if lengths is not None and len(lengths) != len(train_set):
            raise ArgumentError(f"lengths: expected one per training example, {len(train_set)}, got {len(lengths)}")
        given = model
        if model is None:
            model = build_model(config)
        elif config.encoder_dropout is not None:
            model.set_encoder_dropout(config.encoder_dropout)
        start = record.start_of(config, given, model)
        if encoder_tokenizer is None or llm_tokenizer is None:
            loaded = load_tokenizers(
                config.init_checkpoint, encoder=config.encoder, llm=config.llm, config=model.config
            )
            encoder_tokenizer, llm_tokenizer = encoder_tokenizer or loaded[0], llm_tokenizer or loaded[1]
        if resume_from is not None and config.llm_bos_token_id is None:  # a resumed run keeps its first token
            model.config.llm_bos_token_id = LayAlignConfig.from_pretrained(resume_from).llm_bos_token_id
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        _check_trained(model)
        plan = {"world_size": world_size, "micro_batch": micro}
        here = record.make(config, model, (encoder_tokenizer, llm_tokenizer), train_set, dev_set, start, plan)
        changed: list[str] = []
        if overwritten is not None:
            record.compare(config, overwritten, here, model, resumed=False)
            logger.warning("%s: holds a finished model of the same run, which is trained again", config.output_dir)
        if earlier is not None:
            changed = record.compare(config, earlier, here, model, resumed=True)
            here["changes"] = [*earlier.changes, *changed]

        runs.start_over(config)
        here["grouped_by"], lengths = _grouping(config, train_set, lengths, earlier)
        if is_main_process():
            logger.info("%s: writes to %s", config.stage, config.output_dir)
            precision.tell(asked, config, resumed=earlier is not None)
        _tell_first_token(config, model, llm_tokenizer)
        trainer = _trainer(running, model, (encoder_tokenizer, llm_tokenizer), train_set, dev_set, lengths, world_size)
        trainer.record, trainer.keeps_hyperparameters = here, not changed
        for callback in callbacks:
            trainer.add_callback(callback)
        measured = dev_set or train_set[:MEASURED]
        before = LossBefore(asked, trainer, measured, resume_from)
        if is_main_process():
            record.write(Path(config.output_dir), here)
        _train(trainer, resume_from)
        loss_before = before.value
        loss_after = trainer.evaluate(eval_dataset=measured, metric_key_prefix="eval")["eval_loss"]
        with writing(f"output_dir: {config.output_dir}", "the checkpoints in it are intact"):
            trainer.save_model(config.output_dir)

        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        summary = TrainSummary(
            loss_before=loss_before,
            loss_after=loss_after,
            steps=trainer.state.global_step,
            output_dir=config.output_dir,
            seconds=time.perf_counter() - started,
            trained_parameters=trained,
            total_parameters=sum(parameter.numel() for parameter in model.parameters()),
            train_examples=len(train_set),
            dev_examples=len(dev_set),
            resumed_from=str(resume_from) if resume_from else None,
            skipped_steps=trainer.guard.skipped,
            loss_spikes=trainer.guard.spikes,
            cut=_cut(trainer),
            log_history=[{"step": 0, "epoch": 0.0, "eval_loss": loss_before}, *trainer.state.log_history],
        )
        runs.save_run(asked, {**asdict(summary), "micro_batch": trainer.args.per_device_train_batch_size})
        trainer.accelerator.wait_for_everyone()  # the next stage of every process reads what the main process wrote
        leave_engine(trainer)
        return summary


def _grouping(
    config: TrainConfig, train_set: Sequence[Example], lengths: Sequence[int] | None, earlier: record.Earlier | None
) -> tuple[str | None, Sequence[int] | None]:
    """What `group_by_length` sorts by, and the lengths; None if the collator has to count tokens."""
    if not config.group_by_length:
        return None, None
    goes_on = earlier is not None and earlier.settings.get("group_by_length")
    if earlier is not None and goes_on and earlier.record.get("grouped_by") in (None, "letters"):
        # Runs began with counted letters before tokens were counted.
        return "letters", [len(each.source) + len(each.prompt) + len(each.target) for each in train_set]
    return ("tokens" if lengths is None else "given"), lengths


def _cut(trainer: LayAlignTrainer) -> dict[str, int]:
    """How many texts the collators of all processes have truncated; logged if there are any."""
    counts: Counter[str] = sum(gather_object([trainer.data_collator.cuts]), Counter())
    found = {kind: count for kind, count in counts.items() if kind != "examples"}
    if found and is_main_process():
        parts = ", ".join(f"{count} of {kind}" for kind, count in found.items())
        logger.warning("cut, of %d examples read: %s", counts["examples"], parts)
    return dict(counts)


def _train(trainer: LayAlignTrainer, resume_from: Path | None) -> None:
    try:
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    finally:
        trainer.stop.restore()
    step = trainer.state.global_step
    if trainer.stop.agreed and step < trainer.state.max_steps:
        raise StoppedError(
            f"stopped by SIGTERM after step {step}; {trainer.args.output_dir}/checkpoint-{step} is complete, and the "
            "same command resumes from it"
        )


# Data


def read_examples(config: TrainConfig) -> list[Example]:
    """Read the stage's examples, shuffled with `config.seed`. With `skip_bad`, skipped malformed lines are logged.

    Raises:
        ArgumentError: there is no example.
        DataError: the data cannot be read.
    """
    require_config(config)
    examples = _read(config, config.data, languages=config.languages, limit=config.limit)
    if not examples:
        raise ArgumentError(f"data: no example in {config.data} for the languages {config.languages or 'asked for'}")
    return examples


def read_dev_examples(config: TrainConfig) -> list[Example]:
    """Read at most `config.dev_size` examples of `config.dev_data`, drawn with `config.seed`.

    `config.languages` and `config.limit` apply to the training data only; a mapping in `dev_data` has its own.

    Raises:
        ArgumentError: `dev_data` is None, or holds no example.
        DataError: the data cannot be read.
    """
    require_config(config)
    if config.dev_data is None:
        raise ArgumentError("dev_data: expected a path, FORMAT:PATH, a mapping or a list of these, got None")
    examples = _read(config, config.dev_data)
    if not examples:
        raise ArgumentError(f"dev_data: no example in {config.dev_data}")
    if len(examples) > config.dev_size and is_main_process():
        logger.warning("dev_data: %d of its %d examples are used (dev_size)", config.dev_size, len(examples))
    return examples[: config.dev_size]


def _read(config: TrainConfig, data: Any, **options: Any) -> list[Example]:
    default = _translation_format(data) if config.stage == "translation" else config.task
    # A path without FORMAT: is read in the format of the stage.
    named = isinstance(data, str) and data.partition(":")[0] in FORMATS
    examples, report = load_examples(
        data, format=None if named else default, skip_bad=config.skip_bad, seed=config.seed, **options
    )
    if report.skipped:
        logger.warning("%s", report.summary())
    return examples


def _translation_format(data: Any) -> str:
    """The format of a translation folder: the published layout (folders en-XX) or plain pairs."""
    if isinstance(data, str):
        root = Path(data)
        if root.name.startswith("en-") or (root / "bilingual_pairs").is_dir() or any(root.glob("en-*")):
            return "bilingual_pairs"
    return "pairs"


def _split(
    config: TrainConfig, examples: list[Example], dev: Sequence[Example] | None
) -> tuple[list[Example], list[Example]]:
    count, translation = len(examples), config.stage == "translation"
    if dev is not None:
        return _apart(config, examples, list(dev)), list(dev)
    if config.dev_cut == "position" or not config.dev_size:
        dev, examples = examples[: config.dev_size], examples[config.dev_size :]
    else:
        examples, dev, neither = cut_by_sentence(examples, config.dev_size, translation=translation)
        if neither and is_main_process():
            logger.info("dev_cut: %d example(s) with the English of the last dev sentence are skipped", neither)
    if not examples:
        raise ArgumentError(f"dev_size: {config.dev_size} leaves nothing to train on, there are {count} examples")
    return examples, list(dev)


def _apart(config: TrainConfig, examples: list[Example], dev: list[Example]) -> list[Example]:
    """The training examples that may be used with a separate dev split (`dev_overlap`)."""
    rest, shared = apart_from(examples, dev, translation=config.stage == "translation")
    if not shared:
        return examples
    drop = config.dev_overlap == "drop"
    if is_main_process():
        logger.warning(
            "dev_data: %d of %d dev examples share their English with %d training examples, which are %s",
            shared, len(dev), len(examples) - len(rest),
            "skipped" if drop else "trained on: the dev loss will be too low (dev_overlap=drop skips them)",
        )  # fmt: skip
    if drop and not rest:
        raise ArgumentError("dev_overlap: drop leaves nothing to train on, all of data is in dev_data too")
    return rest if drop else examples


# Model


def build_model(config: TrainConfig) -> LayAlignForCausalLM:
    """The model of a stage: new on top of `encoder` and `llm`, or from `init_checkpoint`; with LoRA if configured.

    Seeds the random generators with `config.seed`, so that new parts are always initialized the same.

    Raises:
        ArgumentError: neither a checkpoint nor both frozen parts are named, or the checkpoint has other settings.
        CheckpointError: the checkpoint cannot be used.
    """
    require_config(config)
    set_seed(config.seed)
    dtype = precision.frozen_dtype(config)
    kwargs = {"dtype": "auto" if dtype == "stored" else dtype}
    dropout = {} if config.encoder_dropout is None else {"encoder_dropout": config.encoder_dropout}
    if config.init_checkpoint is None:
        for name in ("encoder", "llm"):
            if getattr(config, name) is None:
                raise ArgumentError(f"{name}: expected a folder or hub name (or an init_checkpoint), got none")
        if config.stage == "task":
            logger.warning("init_checkpoint: none, so the task stage starts without the translation stage")
        model = LayAlignForCausalLM.from_encoder_and_llm(
            config.encoder,
            config.llm,
            encoder_kwargs=kwargs,
            llm_kwargs=kwargs,
            mask_encoder_padding=config.mask_encoder_padding,
            llm_bos_token_id=_first_token(config),
            **dropout,
            **{key: getattr(config, key) for key in _SHAPE},
        )
    else:
        model = LayAlignForCausalLM.from_pretrained(
            config.init_checkpoint, encoder_kwargs=kwargs, llm_kwargs=kwargs, **dropout
        )
        _check_start(config, model)
    if config.lora is not None and model.config.lora is None:
        try:
            model.add_lora({key: value for key, value in config.lora.items() if value is not None})
        except ValueError as error:  # peft's error for an unknown LLM or missing modules
            raise ArgumentError(f"lora: {error}") from error
    return model


def _first_token(config: TrainConfig) -> int | str | bool:
    """The first token of the LLM's input: as configured, or else the one that the LLM's tokenizer adds."""
    if config.llm_bos_token_id is not None:
        return config.llm_bos_token_id
    try:
        found = first_token(load_tokenizer("llm", config.llm))
    except CheckpointError:  # no tokenizer there: the caller may have given one in memory
        return "own"
    if found is None:  # without soft tokens, something has to come before the first label
        return False if config.use_adapter else "own"
    return found


def _check_start(config: TrainConfig, model: LayAlignForCausalLM) -> None:
    """Raise an ArgumentError if the configuration asks for another model than its `init_checkpoint` is."""
    defaults = TrainConfig()
    for key in _SHAPE:
        asked, has = getattr(config, key), getattr(model.config, key)
        if isinstance(asked, str) and key == "encoder_layers":
            assert model.config.encoder_config is not None
            asked = named_layers(asked, number_of_layers(model.config.encoder_config) + 1)
        if key == "adapter_size" and asked == "match":
            asked = matching_adapter_size(model.config)
        if asked not in (getattr(defaults, key), has):
            raise ArgumentError(f"{key}: init_checkpoint {config.init_checkpoint} has {has}, got {asked}")
    asked, has = config.llm_bos_token_id, model.config.llm_bos_token_id
    if asked is not None and (None if asked is False else asked) != has:
        raise ArgumentError(f"llm_bos_token_id: init_checkpoint {config.init_checkpoint} has {has}, got {asked}")
    has_lora = model.config.lora or {}
    for key, asked in (config.lora or {}).items():
        if has_lora and asked is not None and has_lora.get(key) != asked:
            raise ArgumentError(
                f"lora.{key}: init_checkpoint {config.init_checkpoint} has {has_lora.get(key)}, got {asked}"
            )


def _check_trained(model: nn.Module) -> None:
    """Raise an ArgumentError unless something trains, and nothing but aligner, adapter, gates and LoRA does."""
    wrong = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not name.startswith(OWN_PARTS) and "lora_" not in name
    ]
    if wrong:
        raise ArgumentError(f"model: expected encoder and LLM frozen (model.freeze()), {wrong[0]} requires gradients")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ArgumentError("model: expected an adapter, language layers or LoRA to train, this one has none of them")


def _tell_first_token(config: TrainConfig, model: LayAlignForCausalLM, llm_tokenizer: Any) -> None:
    """Warn if the LLM's input and its tokenizer's texts begin differently and the configuration does not ask for it."""
    has, adds = model.config.llm_bos_token_id, first_token(llm_tokenizer)
    own = model.llm.config.get_text_config(decoder=True).bos_token_id
    if config.llm_bos_token_id is not None or (has == adds and not (has is None and own is not None)):
        return
    if has is None:
        logger.warning(
            "llm_bos_token_id: no first token, as the LLM's tokenizer adds none. In many LLMs all positions attend to "
            "the first one, and training can fail if that is a soft token (docs/evidence.md). Set it to a token's "
            "number (%s in the LLM's configuration), or to false to keep none",
            own,
        )
    else:
        logger.warning(
            "llm_bos_token_id: the LLM's input begins with %d, but its tokenizer adds %s; set it to choose: false is "
            "none, a number is that token",
            has, "none" if adds is None else adds,
        )  # fmt: skip


# Trainer


def _trainer(
    config: TrainConfig,
    model: LayAlignForCausalLM,
    tokenizers: tuple[Any, Any],
    train_set: list[Example],
    dev_set: list[Example],
    lengths: Sequence[int] | None,
    world_size: int,
) -> LayAlignTrainer:
    collator = LayAlignCollator.from_model(
        model,
        *tokenizers,
        stage=config.stage,
        max_source_length=config.max_source_length,
        max_prompt_length=config.max_prompt_length,
        max_target_length=config.max_target_length,
    )
    if config.num_workers:
        collator.share_memory()
    if config.group_by_length and lengths is None:
        lengths = collator.lengths(train_set)
    trainer = LayAlignTrainer(
        tokenizers=tokenizers,
        lengths=lengths,
        model=model,
        args=training_arguments(config, world_size, has_dev=bool(dev_set)),
        train_dataset=train_set,
        eval_dataset=dev_set or None,
        data_collator=collator,
        guard=StepGuard(config.max_skipped_steps, config.spike_factor),
        callbacks=[GateHistory()],
    )
    if trainer.sharding is not None and not hasattr(Trainer, "_prepare_for_training"):
        raise ArgumentError(f"sharding: {trainer.sharding} needs transformers 5.3 or later, this is {__version__}")
    if config.max_skipped_steps and (trainer.sharding or "").startswith("ZeRO"):
        raise ArgumentError(
            f"max_skipped_steps: expected 0 with DeepSpeed, which takes its step inside the backward pass, got "
            f"{config.max_skipped_steps}"
        )
    trainer.remove_callback(PrinterCallback)  # ConsoleLines replaces it
    if config.progress is False:
        trainer.add_callback(ConsoleLines(trainer, has_dev=bool(dev_set)))
    trainer.add_callback(SmallRun())
    for callback in trainer.callback_handler.callbacks:
        # The loss before training is logged before transformers sets this, and would go to the working directory.
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(Path(config.output_dir) / "runs")
    return trainer


def training_arguments(config: TrainConfig, world_size: int = 1, *, has_dev: bool = True) -> TrainingArguments:
    """The Trainer's arguments for a configuration.

    Args:
        config: the configuration of a stage.
        world_size: number of processes.
        has_dev: whether there is a dev split; without one nothing is evaluated during training.

    Raises:
        ArgumentError: `batch_size` does not fit `world_size`, or transformers refuses a value.
    """
    require_config(config)
    micro, accumulation = config.batch_plan(world_size)
    evaluate = _when("eval", config.eval_steps if has_dev else 0)
    save = _when("save", config.eval_steps if config.keep_best else config.save_steps)
    bf16 = precision.uses_bf16(config)
    arguments: dict[str, Any] = {
        "output_dir": config.output_dir,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": config.eval_batch_size or micro,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler,
        "warmup_steps": config.warmup_ratio,  # below 1, it is the share of all steps
        "weight_decay": config.weight_decay,
        "adam_beta1": config.adam_beta1,
        "adam_beta2": config.adam_beta2,
        "adam_epsilon": config.adam_epsilon,
        "max_grad_norm": config.max_grad_norm,
        "optim": "adamw_torch_fused",  # one pass over each parameter, on CPUs too
        "bf16": bf16,
        "seed": config.seed,
        "data_seed": config.seed,
        # transformers accepts bf16 on a CPU only with use_cpu.
        "use_cpu": config.use_cpu or (bf16 and not torch.accelerator.is_available()),
        "dataloader_num_workers": config.num_workers,
        "dataloader_pin_memory": torch.cuda.is_available() and not config.use_cpu,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "prediction_loss_only": True,
        "logging_steps": config.logging_steps,
        "save_total_limit": config.save_total_limit,
        "report_to": config.report_to or "none",
        "disable_tqdm": config.progress is not True,
        "ddp_find_unused_parameters": False,  # every trained parameter gets a gradient in every step
        "ddp_broadcast_buffers": False,
        **evaluate,
        **save,
        **sharding_arguments(config, world_size),
    }
    if config.keep_best:
        arguments.update(load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False)
    try:
        result = TrainingArguments(**arguments)
    except (ValueError, ImportError) as error:
        raise ArgumentError(f"configuration: transformers refuses it: {error}") from error
    if result.n_gpu > 1:
        # DataParallel would replicate the frozen parts at every step.
        logger.warning("one process uses one GPU; start with torchrun to use all %d", result.n_gpu)
        result._n_gpu = 1
    return result


def _when(what: str, steps: int | None) -> dict[str, Any]:
    if steps is None:
        return {f"{what}_strategy": "epoch"}
    return {f"{what}_strategy": "steps", f"{what}_steps": steps} if steps else {f"{what}_strategy": "no"}
