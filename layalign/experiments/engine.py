"""What both experiments do with their runs: the files that they leave, the log, and several of them at a time.

Every step of a run writes a file with its fingerprint last. A step that has one is not repeated.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback

from layalign.experiments.settings import Comparison, Run
from layalign.utils.errors import ArgumentError, StoppedError, first_line, whole_number
from layalign.utils.files import write_whole, writing
from layalign.utils.quiet import quiet_transformers
from layalign.utils.reading import read_json

RESULT, LOG = "result.json", "log.jsonl"
# Called with a finished run, its seconds, and its error (None: none).
Tell = Callable[[Run, float, str | None], None]


def run_folder(folder: Path, system: str, seed: int) -> Path:
    """Folder of a run's files."""
    return folder / "runs" / system / f"seed-{seed}"


def read_if_there(path: Path) -> Any:
    """The content of a JSON file of an experiment's folder, or None if there is none."""
    return read_json(path, where=f"output: {path}", error=ArgumentError) if path.is_file() else None


def read_done(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """What a finished step wrote, or None.

    Raises:
        ArgumentError: the step was done with other settings, or the file cannot be read.
    """
    if not path.is_file():
        return None
    found = read_if_there(path)
    if not isinstance(found, dict):
        raise ArgumentError(f"output: {path}: expected the result of a step; remove the file to repeat the step")
    if found.get("fingerprint") != fingerprint:
        raise ArgumentError(
            f"output: {path.parent} was made with other settings; use another folder or remove that one"
        )
    return found


def write_done(path: Path, fingerprint: str, found: dict[str, Any], indent: int | None = 1) -> dict[str, Any]:
    """Write the result of a step with its fingerprint and versions; returns the whole content."""
    content = {"fingerprint": fingerprint, **found, "versions": versions()}
    write_whole(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")
    return content


def collect(
    settings: Comparison, folder: Path, read: Callable[[Path, Any], dict[str, Any] | None]
) -> dict[str, dict[int, dict[str, Any]]]:
    """The results of all finished runs, by system and seed; `read` takes the folder of a run, and its system."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for system in settings.systems:
        for seed in settings.seeds_of(system):
            if (done := read(run_folder(folder, system.name, seed), system)) is not None:
                found.setdefault(system.name, {})[seed] = done
    return found


def log(folder: Path, event: str, **content: Any) -> None:
    """Append a line to the log of all runs, in one write so that lines of several processes do not mix."""
    entry = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "event": event, **content}
    with writing(f"output: {folder / LOG}"):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _commit() -> str | None:
    """The checkout's commit, with a + if its code has uncommitted changes; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("+" if git("status", "--porcelain", "--", "layalign") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, Any]:
    """What the numbers depend on besides the settings."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
    }


class Watch(TrainerCallback):
    """Counts and times the steps of training, without loading and evaluation, and keeps the losses.

    Attributes:
        steps, seconds: the number of steps, and their time by `clock`.
        losses: (step, loss) of every logged step.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.steps, self.seconds, self.losses, self._clock = 0, 0.0, list[tuple[int, float]](), clock

    def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self._started = self._clock()

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.steps, self.seconds = self.steps + 1, self.seconds + self._clock() - self._started

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        if logs and "loss" in logs:
            self.losses.append((state.global_step, round(float(logs["loss"]), 4)))


class _InProcess(Executor):
    """Runs each call at once, in this process."""

    def submit(self, call: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(call(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    quiet_transformers()


def _timed(work: Callable[[Run], object], folder: Path, run: Run) -> float:
    """Do a run; returns its seconds. A failure is logged."""
    started = time.perf_counter()
    try:
        work(run)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}".replace(f"{folder}/", "")  # no local paths in the log
        stage = {"stage": run.stage} if run.stage else {}
        log(folder, "failed", **stage, system=run.system, seed=run.seed, problem=problem)
        raise
    return time.perf_counter() - started


def run_all(
    runs: Sequence[Run],
    work: Callable[[Run], object],
    folder: Path,
    jobs: int,
    tell: Tell,
    needs: Callable[[Run, Run], bool] = lambda run, other: False,
    here: bool = False,
) -> list[Run]:
    """Do runs, in this order as far as possible.

    Args:
        runs: the runs.
        work: does one of them; it is pickled.
        folder: folder of the experiment, for the log.
        jobs: number of runs at a time, each in its own process with a share of the cores.
        tell: called after each run.
        needs: whether the first of two runs needs the second one.
        here: do them in this process, one after another.

    Returns:
        The failed runs, including those that need a failed one.

    Raises:
        StoppedError: a training run received SIGTERM; no further run is started.
    """
    waiting, failed, pending = list(runs), list[Run](), dict[Future[float], Run]()
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    threads = (max(1, (os.cpu_count() or 1) // whole_number("jobs", jobs, least=1)),)
    with (
        _InProcess()
        if here
        else ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=threads)
    ) as pool:
        while waiting or pending:
            for run in list(waiting):
                if any(needs(run, other) for other in failed):
                    waiting.remove(run)
                    failed.append(run)
                elif len(pending) < jobs and not any(needs(run, other) for other in (*waiting, *pending.values())):
                    waiting.remove(run)
                    pending[pool.submit(partial(_timed, work, folder), run)] = run
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                run, error = pending.pop(future), future.exception()
                if isinstance(error, StoppedError):
                    raise error
                if error is not None:
                    failed.append(run)
                told = None if error is None else f"{type(error).__name__}: {first_line(error)}"
                tell(run, future.result() if error is None else 0.0, told)
    return failed
