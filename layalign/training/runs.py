"""What a training run leaves in its folder, and how a later one goes on from it."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import yaml

from layalign._files import write_whole, writing
from layalign._reading import read_json
from layalign.errors import ArgumentError, CheckpointError, shown
from layalign.training.checkpoints import check_writable, checkpoints, clear_unfinished, problem, remove
from layalign.training.config import TrainConfig

logger = logging.getLogger("layalign")

CONFIG_FILE = "train_config.yaml"
RUN_FILE = "training.json"
# What a resumed run may change: it alters neither the data nor the steps already taken.
_FREE_KEYS = {
    "output_dir", "resume", "epochs", "max_steps", "logging_steps", "eval_steps", "save_steps", "save_total_limit",
    "keep_best", "report_to", "progress", "num_workers", "eval_batch_size", "use_cpu", "init_checkpoint",
    "max_skipped_steps", "spike_factor", "sharding",
}  # fmt: skip


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def find_resume(config: TrainConfig) -> Path | None:
    """The checkpoint to go on from, or None. Starting over removes the folder's old checkpoints.

    Raises:
        ArgumentError: there is no such checkpoint, it is damaged, or its run had other settings.
        OutputError: the run's folder cannot be written to.
    """
    output = Path(config.output_dir)
    if is_main_process():
        with writing(f"output_dir: {output}"):
            check_writable(output)
            clear_unfinished(output)
    if config.resume is False:
        if is_main_process():
            for path in checkpoints(output):
                logger.warning("resume: false, so %s is removed", path)
                remove(path)
        return None
    if config.resume == "auto":
        found = checkpoints(output)
        chosen = found[-1] if found else None
    else:
        chosen = Path(str(config.resume))
        if not chosen.is_dir():
            raise ArgumentError(f"resume: expected auto, false or a checkpoint-N folder of a run, got {chosen}")
        if (wrong := problem(chosen)) is not None:
            raise ArgumentError(f"resume: {chosen} is not a whole checkpoint: {wrong}")
    if chosen is not None:
        _check_same_run(config, chosen.parent / CONFIG_FILE)
    return chosen


def _check_same_run(config: TrainConfig, file: Path) -> None:
    """A run can only go on with what it began with."""
    if not file.is_file():
        return
    before = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    for key, value in config.to_dict().items():
        if key in before and key not in _FREE_KEYS and before[key] != value:
            raise ArgumentError(
                f"{key}: the run in {file.parent} has {before[key]!r}, this one {value!r}; "
                "set resume=false to start over, or another output_dir"
            )


def save_run(config: TrainConfig, content: dict[str, Any]) -> None:
    """Write the configuration and `content` to the run's folder (main process only)."""
    if not is_main_process():
        return
    output = Path(config.output_dir)
    with writing(f"output_dir: {output}"):
        output.mkdir(parents=True, exist_ok=True)
    write_whole(output / CONFIG_FILE, config.to_yaml())
    write_whole(output / RUN_FILE, json.dumps(content, indent=2))


def read_run(folder: Path) -> dict[str, Any]:
    """What `save_run` wrote; empty when there is nothing to read.

    What is damaged is left out with a warning: a run can go on without it, with other micro batches perhaps.
    """
    file = folder / RUN_FILE
    if not os.path.lexists(file):
        return {}
    try:
        content = read_json(file)
        if not isinstance(content, dict):
            raise CheckpointError(f"{file}: expected a mapping, got {shown(content)}")
    except CheckpointError as error:
        logger.warning("%s; the run goes on without its loss before training and its micro batch", error)
        return {}
    micro, loss = content.get("micro_batch"), content.get("loss_before")
    good = {
        "micro_batch": micro is None or (isinstance(micro, int) and not isinstance(micro, bool) and micro > 0),
        "loss_before": loss is None or (isinstance(loss, int | float) and not isinstance(loss, bool)),
    }
    for key in (key for key, fine in good.items() if not fine):
        logger.warning("%s: %s: expected a number above 0, got %s; left out", file, key, shown(content.pop(key)))
    return content
