"""What a run in several processes needs besides its trainer: engine settings, the first loss, equal micro batches."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from layalign.data import Example
from layalign.training import runs
from layalign.training.config import TrainConfig
from layalign.training.loading import PRESETS
from layalign.utils.errors import ArgumentError

if TYPE_CHECKING:
    from layalign.training.trainer import LayAlignTrainer

logger = logging.getLogger("layalign")

_FSDP2 = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "reshard_after_forward": True,
    "state_dict_type": "FULL_STATE_DICT",
    "cpu_ram_efficient_loading": False,
}


def preset_file(kind: str, name: str) -> Path:
    """A configuration that ships with the package: kind "accelerate" or "deepspeed", name such as "zero3.json"."""
    return PRESETS / kind / name


def sharding_arguments(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """The Trainer's arguments for `config.sharding`; empty if that is left to the launcher.

    Raises:
        ArgumentError: the run has one process, or DeepSpeed is not installed.
    """
    if config.sharding is None:
        return {}
    if world_size < 2:
        raise ArgumentError(f"sharding: {config.sharding} needs several processes (torchrun), this run has one")
    if config.sharding == "fsdp2":
        return {"fsdp": True, "fsdp_config": dict(_FSDP2)}
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise ArgumentError(
            f"sharding: {config.sharding} needs the package deepspeed (pip install 'layalign[deepspeed]')"
        ) from error
    return {"deepspeed": json.loads(preset_file("deepspeed", f"{config.sharding}.json").read_text(encoding="utf-8"))}


def leave_engine(trainer: LayAlignTrainer) -> None:
    """Switch ZeRO-3 off: transformers applies it to models loaded later while anything refers to the run's settings."""
    if trainer.is_deepspeed_enabled:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def with_kept_micro_batch(config: TrainConfig, run: dict[str, Any], world_size: int) -> TrainConfig:
    """The configuration of a resumed run with the micro batch of its start, since another one changes the losses.

    Args:
        config: not modified, so that the saved configuration keeps `micro_batch_size: null`.
        run: what `runs.read_run` returned.
        world_size: number of processes.
    """
    known = run.get("micro_batch")
    if config.micro_batch_size is not None or not isinstance(known, int):
        return config
    if config.batch_size % (known * world_size) == 0:
        return replace(config, micro_batch_size=known)
    logger.warning(
        "micro_batch_size: the run had %d, which does not fit %d processes: from here on its losses differ from "
        "those of an uninterrupted run",
        known,
        world_size,
    )
    return config


class LossBefore(TrainerCallback):
    """Measures the loss before training and writes the run's first `training.json`; a resumed run reads it from there.

    A sharded model can run only after training has begun and is measured then; any other is measured at once.

    Attributes:
        value: the loss; NaN if a resumed, sharded run cannot read it any more.
    """

    def __init__(
        self, config: TrainConfig, trainer: LayAlignTrainer, measured: Sequence[Example], resume_from: Path | None
    ) -> None:
        self._config, self._trainer, self._measured = config, trainer, measured
        self.value = float("nan")
        known = runs.read_run(resume_from.parent).get("loss_before") if resume_from is not None else None
        if isinstance(known, float):
            self._record(known)
            return
        if resume_from is not None:
            logger.warning(
                "%s: loss_before is not recorded; measured now, before the checkpoint is loaded", resume_from.parent
            )
        if trainer.sharding is None:
            metrics = trainer.evaluate(eval_dataset=measured, metric_key_prefix="eval")
            self._record(float(metrics["eval_loss"]))
        else:
            self._record(self.value)
            if resume_from is None:
                trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            loader = self._trainer.get_eval_dataloader(self._measured)
            self._record(float(self._trainer.evaluation_loop(loader, "Evaluation").metrics["eval_loss"]))

    def _record(self, value: float) -> None:
        self.value = value
        micro = self._trainer.args.per_device_train_batch_size
        known = {} if value != value else {"loss_before": value}
        runs.save_run(self._config, {**known, "micro_batch": micro})
