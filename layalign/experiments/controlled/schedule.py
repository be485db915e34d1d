"""Runs the unfinished runs of an experiment, several at a time, each in its own process."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layalign.experiments.controlled.settings import ExperimentSettings
from layalign.utils.errors import ArgumentError, StoppedError

# Called with a finished task, its seconds, and its error (None: none).
Tell = Callable[["Task", float, str | None], None]


@dataclass(frozen=True, order=True)
class Task:
    """The pre-training of a seed (no system), or a run. Sorted in order of execution: seeds, then system by system."""

    place: int
    seed: int
    system: str | None = None

    @property
    def name(self) -> str:
        """Name for the log."""
        return f"{self.system or 'pre-training'}, seed {self.seed}"


def tasks(settings: ExperimentSettings, only: Sequence[str] | None, seeds: Sequence[int] | None) -> list[Task]:
    """All tasks, in order of execution.

    Raises:
        ArgumentError: a system or seed is not in the settings.
    """
    chosen = [settings.system(name).name for name in only] if only else [system.name for system in settings.systems]
    for seed in seeds or ():
        if seed not in settings.seeds:
            raise ArgumentError(f"seeds: expected some of {settings.seeds}, got {seed}")
    numbers = list(seeds or settings.seeds)
    places = {system.name: i for i, system in enumerate(settings.systems)}
    return sorted(
        [Task(-1, seed) for seed in numbers] + [Task(places[name], seed, name) for name in chosen for seed in numbers]
    )


def start_worker(threads: int) -> None:
    """Initialize a worker process with its share of the threads."""
    import torch

    from layalign.utils.quiet import quiet_transformers

    torch.set_num_threads(threads)
    quiet_transformers()


def _work(settings: ExperimentSettings, folder: Path, task: Task) -> float:
    from layalign.experiments.controlled import runs

    started = time.perf_counter()
    runs.log(folder, "start", system=task.system, seed=task.seed)
    if task.system is None:
        runs.prepare(settings, folder, task.seed)
    else:
        runs.run(settings, folder, task.system, task.seed)
    return time.perf_counter() - started


def _is_done(settings: ExperimentSettings, folder: Path, task: Task) -> bool:
    from layalign.experiments.controlled import runs

    if task.system is None:
        path = runs.seed_folder(folder, task.seed) / runs.PREPARED
        return runs.read_done(path, settings.fingerprint()) is not None
    path = runs.run_folder(folder, task.system, task.seed) / runs.RESULT
    return runs.read_done(path, settings.fingerprint(settings.system(task.system))) is not None


def run_all(
    settings: ExperimentSettings,
    folder: Path,
    *,
    only: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    jobs: int = 1,
    tell: Tell = lambda task, seconds, problem: None,
) -> list[Task]:
    """Run all unfinished tasks.

    Args:
        settings: settings of the experiment.
        folder: folder for everything; it must not hold runs of another experiment.
        only, seeds: limit the tasks to these systems and seeds.
        jobs: number of tasks at a time; they share the cores.
        tell: called after each task.

    Returns:
        The failed tasks, including the runs of a seed whose pre-training failed.

    Raises:
        ArgumentError: a system or seed is not in the settings, or the folder holds runs of other settings.
        StoppedError: a training run received SIGTERM; no further task is started.
    """
    if jobs < 1:
        raise ArgumentError(f"jobs: expected at least 1, got {jobs}")
    waiting = [task for task in tasks(settings, only, seeds) if not _is_done(settings, folder, task)]
    pending: dict[Future[float], Task] = {}
    failed: list[Task] = []
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=start_worker, initargs=(threads,)) as pool:
        while waiting or pending:
            unready = {task.seed for task in (*waiting, *pending.values()) if task.system is None}
            dead = {task.seed for task in failed if task.system is None}
            lost = [task for task in waiting if task.seed in dead]
            failed += lost
            waiting = [task for task in waiting if task not in lost]
            for task in list(waiting):
                if len(pending) < jobs and (task.system is None or task.seed not in unready):
                    waiting.remove(task)
                    pending[pool.submit(_work, settings, folder, task)] = task
            if not pending:
                continue
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                _finish(folder, future, pending.pop(future), failed, tell)
    return failed


def _finish(folder: Path, future: Future[float], task: Task, failed: list[Task], tell: Tell) -> None:
    from layalign.experiments.controlled import runs

    problem: Any = future.exception()
    if problem is None:
        seconds = round(future.result(), 1)
        runs.log(folder, "done", system=task.system, seed=task.seed, seconds=seconds)
        tell(task, seconds, None)
        return
    text = f"{type(problem).__name__}: {problem}"
    runs.log(folder, "failed", system=task.system, seed=task.seed, problem=text)
    if isinstance(problem, StoppedError):
        raise problem
    failed.append(task)
    tell(task, 0.0, text)
