"""Progress display: a bar per phase, and a line with its time when it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback


class Phases:
    """Times the phases of a run and shows them.

    Attributes:
        console: where to print.
        shown: whether anything is printed.
        seconds: wall time by phase, in order.
    """

    def __init__(self, console: Console | None = None, shown: bool = True) -> None:
        self.console = console or Console()
        self.shown = shown
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[Callable[..., None]]:
        """Time a block. It yields a function to report progress: (step, steps, loss), where the loss is optional."""
        started = time.perf_counter()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        notes: list[str] = []
        with Progress(
            *columns, console=self.console, transient=True, disable=not (self.shown and self.console.is_terminal)
        ) as bar:
            task = bar.add_task(name, total=None, note="")

            def steps(step: int, total: int, loss: float | None = None) -> None:
                notes[:] = [] if loss is None else [f"loss {loss:.3f}"]
                bar.update(task, completed=step, total=total, note="".join(notes))

            yield steps
        self.seconds[name] = time.perf_counter() - started
        if self.shown:
            self.console.print(f"{name}: {self.seconds[name]:.1f} s" + "".join(f", {note}" for note in notes))

    @contextmanager
    def counting(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Time a block that processes ``total`` items. It yields a function to report how many more are done."""
        with self.phase(name) as steps:
            done = 0

            def advance(count: int) -> None:
                nonlocal done
                done += count
                steps(done, total)

            yield advance


class StepCallback(TrainerCallback):
    """Reports the Trainer's steps and losses to a phase."""

    def __init__(self, steps: Callable[[int, int, float], None]) -> None:
        self.steps = steps

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        """Show the loss that the Trainer has just logged."""
        if logs and "loss" in logs:
            self.steps(state.global_step, state.max_steps, float(logs["loss"]))
