"""The folder of a training run: locking it, finding the checkpoint to resume from, `training.json`."""

from __future__ import annotations

import json
import logging
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from layalign.training.checkpoints import check_writable, checkpoints, clear_unfinished, problem, remove
from layalign.training.config import TrainConfig
from layalign.training.record import SETTINGS
from layalign.utils.errors import ArgumentError, CheckpointError, shown
from layalign.utils.files import write_whole, writing
from layalign.utils.processes import Processes
from layalign.utils.reading import read_json

logger = logging.getLogger("layalign")

RUN_FILE = "training.json"


def is_main_process() -> bool:
    """Whether this process prints and writes: rank 0."""
    return int(os.environ.get("RANK", "0")) == 0


def alone_in(folder: str | Path) -> AbstractContextManager[None]:
    """Lock the run's folder for the duration of a block, in the main process (`layalign.utils.lock.held`).

    If the process group is already initialized, all processes raise what the main one raises. Otherwise the main one
    exits, and the launcher (torchrun and accelerate do) ends the others before any of them has written.
    """
    processes = Processes()
    return processes.all_held(folder) if processes.world > 1 or is_main_process() else nullcontext()


def find_resume(config: TrainConfig) -> Path | None:
    """The checkpoint to resume from, or None. What a killed run left half-written is removed.

    Raises:
        ArgumentError: there is no such checkpoint, or it is damaged.
        OutputError: the run's folder cannot be written to.
    """
    output = Path(config.output_dir)
    if is_main_process():
        with writing(f"output_dir: {output}"):
            check_writable(output)
            clear_unfinished(output)
    if config.resume is False:
        return None
    if config.resume == "auto":
        found = checkpoints(output)
        chosen = found[-1] if found else None
    else:
        chosen = Path(str(config.resume))
        if not chosen.is_dir():
            raise ArgumentError(f"resume: expected auto, false or a checkpoint-N folder of a run, got {chosen}")
        if (wrong := problem(chosen)) is not None:
            raise ArgumentError(f"resume: {chosen} is not a complete checkpoint: {wrong}")
    return chosen


def start_over(config: TrainConfig) -> None:
    """Remove the folder's checkpoints if `resume` is false. Call it after everything else has been checked."""
    if config.resume is False and is_main_process():
        for path in checkpoints(config.output_dir):
            logger.warning("resume: is false, so %s is removed", path)
            remove(path)


def save_run(config: TrainConfig, content: dict[str, Any]) -> None:
    """Write the configuration and `content` to the run's folder (main process only)."""
    if not is_main_process():
        return
    output = Path(config.output_dir)
    write_whole(output / SETTINGS, config.to_yaml())
    write_whole(output / RUN_FILE, json.dumps(content, indent=2))


def read_run(folder: Path) -> dict[str, Any]:
    """What `save_run` wrote; empty if there is nothing to read.

    Damaged entries are skipped with a warning: a run can be resumed without them, perhaps with another micro batch.
    """
    file = folder / RUN_FILE
    if not os.path.lexists(file):
        return {}
    try:
        content = read_json(file)
        if not isinstance(content, dict):
            raise CheckpointError(f"{file}: expected a mapping, got {shown(content)}")
    except CheckpointError as error:
        logger.warning("%s; resuming without the loss before training and the micro batch", error)
        return {}
    for key, kinds in (("micro_batch", (int,)), ("loss_before", (int, float))):
        value = content.get(key)
        if value is not None and (type(value) not in kinds or (key == "micro_batch" and value < 1)):
            logger.warning("%s: %s: expected a number above 0, got %s; ignored", file, key, shown(content.pop(key)))
    return content
