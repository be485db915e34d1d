"""Runs the unfinished runs of the experiment; interrupted ones are resumed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from layalign.experiments import engine
from layalign.experiments.real import ablation, looks, runs, task
from layalign.experiments.real.data import read_data
from layalign.experiments.real.settings import RealSettings
from layalign.experiments.settings import Run
from layalign.utils.files import write_whole

DATA = "data.json"


def run_all(
    settings: RealSettings,
    folder: Path,
    *,
    only: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    stage: str | None = None,
    jobs: int = 1,
    tell: engine.Tell = lambda run, seconds, problem: None,
) -> list[Run]:
    """Choose learning rates, train and test.

    Args:
        settings: settings of the experiment.
        folder: folder for everything.
        only, seeds, stage: limit the runs to these systems and seeds, and to one stage.
        jobs: number of runs at a time. If more than one, each has its own process and a share of the cores.
        tell: called after each run.

    Returns:
        The failed runs.

    Raises:
        ArgumentError: a system or seed is not in the settings, or the text is missing.
        DataError: the text cannot be read.
        StoppedError: a training run received SIGTERM; no further run is started.
    """
    waiting, data = settings.runs(only, seeds, stage), read_data(settings)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / DATA, data.to_json())
    return engine.run_all(waiting, partial(_run, settings, folder), folder, jobs, tell, here=jobs == 1)


def _run(settings: RealSettings, folder: Path, run: Run) -> None:
    data = read_data(settings)
    if run.stage == "task":
        system = task.settings_of(settings).system(run.system)
        task.task_run(settings, system, data, task.read_task(settings), folder, run.seed)
        return
    system = settings.system(run.system)
    runs.test_run(settings, system, data, folder, run.seed)
    if system.name in settings.ablated and run.seed == settings.seeds_of(system)[0]:
        ablation.ablate_run(settings, system, data, folder, run.seed)
        looks.look_run(settings, system, data, folder, run.seed)
