"""Trains and evaluates a tiny model in processes that are killed (SIGKILL) until all is done; for test_recovery.py.

One process imports everything and forks a child per attempt: what a start costs is paid once. A child that is killed
dies as a job of a cluster does, without a chance to tidy up. Prints what happened as JSON.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_training import TinyParts, save_parts, training_config
from tqdm import tqdm

from layalign import LayAlignForCausalLM
from layalign.evaluation import evaluate
from layalign.modeling.tokenization import load_tokenizers
from layalign.training import train
from layalign.training.checkpoints import UNFINISHED, checkpoints
from layalign.utils.errors import ArgumentError

DEADLINE = 120.0
STACKS = tempfile.TemporaryFile("w+")  # noqa: SIM115  (of a child that hangs; the process ends with it)
STEPS, EVERY = 24, 2


def forked(job: Callable[[], object]) -> int:
    """Run a job in a process of its own, silent; exit status 0 if it returned."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (the process ends with it)
        faulthandler.register(signal.SIGUSR1, STACKS)
        job()
        code = 0
    finally:
        os._exit(code)


def child(parts: TinyParts, output: Path) -> int:
    """Start the training run, or go on with it."""
    changes = {"max_steps": STEPS, "save_steps": EVERY, "eval_steps": 2 * EVERY, "batch_size": 4}
    return forked(lambda: train(training_config(parts, output, **changes)))


def second(parts: TinyParts, output: Path, first: int) -> int:
    """Start a run in the folder of another one; exit status 3 if it is told that `first` holds it."""

    def job() -> None:
        try:
            train(training_config(parts, output, resume=False))
        except ArgumentError as error:
            if f"{output} is in use by process {first} on" in str(error):
                os._exit(3)

    return forked(job)


def overlapping(parts: TinyParts, folder: Path, whole: Path) -> float:
    """A run that another one, which would start over, finds in its folder; killed, it goes on. Seconds of refusing."""
    output = folder / "overlapping"
    first = child(parts, output)
    while not steps_done(output):
        assert os.waitpid(first, os.WNOHANG)[0] == 0
    started = time.monotonic()
    assert os.waitstatus_to_exitcode(wait(second(parts, output, first), DEADLINE) or 0) == 3
    seconds = time.monotonic() - started
    assert os.waitpid(first, os.WNOHANG)[0] == 0
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    assert steps_done(output)
    assert wait(child(parts, output), DEADLINE) == 0
    compare(whole, output)
    return seconds


def wait(pid: int, seconds: float) -> int | None:
    """Exit status within that time, or None."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > end:
            return None
        time.sleep(0.001)


def steps_done(output: Path) -> int:
    """How far the run has come: the step of its newest checkpoint."""
    return max((int(path.name.partition("-")[2]) for path in output.glob("checkpoint-*")), default=0)


def kill_while_writing(pid: int, output: Path, draw: random.Random) -> str | None:
    """Wait until a checkpoint that is being written has a drawn number of files, and kill then (or just behind it)."""
    staging = output / UNFINISHED
    wanted, begun = draw.randint(0, 14), False
    end = time.monotonic() + DEADLINE
    while True:
        count = sum(len(names) for _, _, names in os.walk(staging))
        if begun and (count >= wanted or not staging.is_dir()):
            break
        begun = begun or staging.is_dir()
        if os.waitpid(pid, os.WNOHANG)[0]:
            return None
        if time.monotonic() > end:
            os.kill(pid, signal.SIGUSR1)
            time.sleep(1)
            os.kill(pid, signal.SIGKILL)
            STACKS.seek(0)
            names = sorted(path.name for path in output.glob("*"))
            raise AssertionError(f"a run does not get on: {names}, all of its threads:\n{STACKS.read()}")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    left = sorted(path.name for path in staging.rglob("*") if path.is_file())
    return f"{len(left)} files written, {left[-1]} last by name" if left else "before the first file or just named"


def kill_at_random(pid: int, seconds: float, draw: random.Random) -> str | None:
    """Kill at a moment drawn from the whole time that an attempt takes."""
    after = draw.uniform(0, seconds)
    if wait(pid, after) is not None:
        return None
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return f"after {after:.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--evaluations", type=int, default=5, help="Evaluations to kill.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    # A forked process has no other threads, and would wait for ever for a lock that one of them holds.
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())  # its own is of all processes together: one that is killed with it stops the next
    parts = save_parts(options.folder)

    whole = options.folder / "whole"
    started = time.monotonic()
    assert wait(child(parts, whole), DEADLINE) == 0, "the uninterrupted run failed"
    seconds = time.monotonic() - started

    refused = overlapping(parts, options.folder, whole)
    kills: list[dict[str, object]] = []
    runs = 0
    while len(kills) < options.kills:
        output = options.folder / f"cut{runs}"
        runs += 1
        while True:
            before = steps_done(output)
            pid = child(parts, output)
            writing = len(kills) % 2 == 0
            how = kill_while_writing(pid, output, draw) if writing else kill_at_random(pid, seconds / 2, draw)
            if how is None:
                break  # it came to its end first
            named = sorted(output.glob("checkpoint-*"))
            good = checkpoints(output)
            assert len(good) == len(named), f"half written: {set(named) - set(good)}"
            kills.append(
                {"writing": writing, "how": how, "from step": before, "unfinished": (output / UNFINISHED).is_dir()}
            )
            if len(kills) >= options.kills:
                break
        if not (output / "training.json").is_file() or "steps" not in json.loads(
            (output / "training.json").read_text(encoding="utf-8")
        ):
            assert wait(child(parts, output), DEADLINE) == 0, "the resumed run failed"
        compare(whole, output)
    evaluations = killed_evaluations(whole, parts, options.folder, options.evaluations, draw)
    told = {"kills": kills, "runs": runs, "steps": STEPS, "seconds": seconds, "evaluations": evaluations}
    print(json.dumps({**told, "refused in": refused}))


def killed_evaluations(checkpoint: Path, parts: TinyParts, folder: Path, kills: int, draw: random.Random) -> list[int]:
    """Kill an evaluation again and again; how many answers were on the disk at each kill. The end is the same."""
    model = LayAlignForCausalLM.from_pretrained(checkpoint)
    tokenizers = load_tokenizers(checkpoint)
    settings = {"batch_size": 1, "max_new_tokens": 60}

    def run(output: Path) -> int:
        return forked(lambda: evaluate(model, *tokenizers, "mgsm", f"mgsm:{parts.data}", output, **settings))

    started = time.monotonic()
    assert wait(run(folder / "asked"), DEADLINE) == 0, "the uninterrupted evaluation failed"
    seconds = time.monotonic() - started
    kept: list[int] = []
    while len(kept) < kills:
        output = folder / f"asked{len(kept)}"
        while len(kept) < kills and kill_at_random(run(output), seconds, draw) is not None:
            kept.append(sum(path.read_bytes().count(b"\n") for path in output.glob("predictions/*.jsonl")))
        assert wait(run(output), DEADLINE) == 0, "the resumed evaluation failed"
        for path in [*sorted((folder / "asked").glob("predictions/*.json")), folder / "asked" / "scores.json"]:
            assert path.read_bytes() == (output / path.relative_to(folder / "asked")).read_bytes(), path
    return kept


def compare(whole: Path, cut: Path) -> None:
    """Losses of every step, dev losses and weights of the two runs are equal, bit for bit."""
    told = [json.loads((folder / "training.json").read_text(encoding="utf-8")) for folder in (whole, cut)]
    for key in ("loss", "eval_loss", "learning_rate", "grad_norm"):
        curves = [[(e["step"], e[key]) for e in run["log_history"] if key in e] for run in told]
        assert curves[0] == curves[1], f"{key} differs: {curves}"
        assert len(curves[0]) >= STEPS // (2 * EVERY)
    assert told[0]["loss_after"] == told[1]["loss_after"]
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, cut))
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)


if __name__ == "__main__":
    main()
