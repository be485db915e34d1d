"""Runs the unfinished runs of an experiment, several at a time, each in its own process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from layalign.experiments import engine
from layalign.experiments.controlled import runs
from layalign.experiments.controlled.settings import ExperimentSettings
from layalign.experiments.settings import Run


def _work(settings: ExperimentSettings, folder: Path, run: Run) -> None:
    started = time.perf_counter()
    engine.log(folder, "start", system=run.system, seed=run.seed)
    if run.system is None:
        runs.prepare(settings, folder, run.seed)
    else:
        runs.run(settings, folder, run.system, run.seed)
    engine.log(folder, "done", system=run.system, seed=run.seed, seconds=round(time.perf_counter() - started, 1))


def _is_done(settings: ExperimentSettings, folder: Path, run: Run) -> bool:
    if run.system is None:
        return engine.read_done(runs.seed_folder(folder, run.seed) / runs.PREPARED, settings.fingerprint()) is not None
    path = engine.run_folder(folder, run.system, run.seed) / engine.RESULT
    return engine.read_done(path, settings.fingerprint(settings.system(run.system))) is not None


def _needs(run: Run, other: Run) -> bool:
    """A run needs the pre-training of its seed."""
    return run.system is not None and other.system is None and run.seed == other.seed


def run_all(
    settings: ExperimentSettings,
    folder: Path,
    *,
    only: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    jobs: int = 1,
    tell: engine.Tell = lambda run, seconds, problem: None,
) -> list[Run]:
    """Do all unfinished runs.

    Args:
        settings: settings of the experiment.
        folder: folder for everything; it must not hold runs of another experiment.
        only, seeds: limit the runs to these systems and seeds.
        jobs, tell: as for :func:`layalign.experiments.engine.run_all`.

    Returns:
        The failed runs, including those of a seed whose pre-training failed.

    Raises:
        ArgumentError: a system or seed is not in the settings, or the folder holds runs of other settings.
        StoppedError: a training run received SIGTERM; no further run is started.
    """
    waiting = [run for run in settings.runs(only, seeds) if not _is_done(settings, folder, run)]
    return engine.run_all(waiting, partial(_work, settings, folder), folder, jobs, tell, _needs)
