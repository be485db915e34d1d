"""Runs the unfinished runs of the experiment, several at a time; interrupted ones are resumed."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from layalign.experiments.controlled.schedule import start_worker
from layalign.experiments.real.data import read_data
from layalign.experiments.real.settings import RealSettings
from layalign.utils.errors import StoppedError, first_line, whole_number
from layalign.utils.files import write_whole

DATA = "data.json"
Run = tuple[str, str, int]  # stage, system, seed
Tell = Callable[[Run, str | None], None]


def run_all(
    settings: RealSettings,
    folder: Path,
    *,
    only: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    stage: str | None = None,
    jobs: int = 1,
    tell: Tell = lambda run, problem: None,
) -> list[Run]:
    """Choose learning rates, train and test.

    Args:
        settings: settings of the experiment.
        folder: folder for everything.
        only, seeds, stage: limit the runs to these systems and seeds, and to one stage.
        jobs: number of runs at a time. If more than one, each has its own process and a share of the cores.
        tell: called after each run, with its error or None.

    Returns:
        The failed runs.

    Raises:
        ArgumentError: a system or seed is not in the settings, or the text is missing.
        DataError: the text cannot be read.
        StoppedError: a training run received SIGTERM; no further run is started.
    """
    whole_number("jobs", jobs, least=1)
    waiting: list[Run] = settings.runs(only, seeds, stage)
    failed: list[Run] = []
    data = read_data(settings)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / DATA, data.to_json())

    def ended(run: Run, error: BaseException | None) -> None:
        if error is not None:
            failed.append(run)
        tell(run, None if error is None else f"{type(error).__name__}: {first_line(error)}")

    if jobs == 1:
        for run in waiting:
            try:
                _run(settings, folder, *run)
            except StoppedError:
                raise
            except Exception as error:  # reported; the other runs continue
                ended(run, error)
            else:
                ended(run, None)
        return failed
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    threads = (max(1, (os.cpu_count() or 1) // jobs),)
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=start_worker, initargs=threads) as pool:
        pending = {pool.submit(_run, settings, folder, *run): run for run in waiting}
        for future in as_completed(pending):
            problem = future.exception()
            if isinstance(problem, StoppedError):
                pool.shutdown(cancel_futures=True)
                raise problem
            ended(pending[future], problem)
    return failed


def _run(settings: RealSettings, folder: Path, stage: str, system: str, seed: int) -> None:
    from layalign.experiments.real import ablation, looks, runs, task

    try:
        data = read_data(settings)
        if stage == "task":
            task.task_run(settings, task.system_of(settings, system), data, task.read_task(settings), folder, seed)
            return
        each = settings.system(system)
        runs.test_run(settings, each, data, folder, seed)
        if system in settings.ablated and seed == settings.seeds_of(each)[0]:
            ablation.ablate_run(settings, each, data, folder, seed)
            looks.look_run(settings, each, data, folder, seed)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}".replace(f"{folder}/", "")  # no local paths in the log
        runs.log(folder, "failed", stage=stage, system=system, seed=seed, problem=problem)
        raise
