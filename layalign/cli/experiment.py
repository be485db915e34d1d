"""`layalign experiment`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[str, typer.Option("--config", "-c", help="A .yaml file, or a preset: controlled, larger, smoke.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for everything; a rerun goes on with it.")]
Only = Annotated[str | None, typer.Option("--only", help="Some of the systems, with commas between.")]
Seeds = Annotated[str | None, typer.Option("--seeds", help="Some of the seeds, with commas between.")]
Jobs = Annotated[int, typer.Option("--jobs", "-j", min=1, help="Runs at a time; each gets its share of the cores.")]
ReportOnly = Annotated[bool, typer.Option("--report", help="Train nothing: write the report of what is done.")]


def experiment(
    config: Config = "controlled",
    output: Output = Path("experiment-output"),
    only: Only = None,
    seeds: Seeds = None,
    jobs: Jobs = 1,
    report: ReportOnly = False,
) -> None:
    """Compare LayAlign with its baselines and ablations on generated problems, over several seeds. Takes hours.

    Example: layalign experiment --only layalign,mindmerger-soft --seeds 0
    """
    from rich.console import Console
    from rich.table import Table

    from layalign.cli.common import listed, quiet_transformers
    from layalign.errors import ArgumentError
    from layalign.experiment import load_settings
    from layalign.experiment.report import accuracy_rows, write_report
    from layalign.experiment.results import write_results
    from layalign.experiment.schedule import Task, run_all

    quiet_transformers()
    console, settings = Console(), load_settings(config)
    numbers = None if seeds is None else [_seed(text) for text in seeds.split(",")]

    def tell(task: Task, seconds: float, problem: str | None) -> None:
        text = f"{seconds:.0f} s" if problem is None else f"failed: {problem}"
        console.print(f"{task.name}: {text}", highlight=False, markup=False, soft_wrap=True)

    failed = [] if report else run_all(settings, output, only=listed(only), seeds=numbers, jobs=jobs, tell=tell)
    if not any((output / "runs").glob("*/*/result.json")):
        raise ArgumentError(f"output: no finished run in {output}")
    found = write_results(settings, output)
    write_report(output, found)
    header, *rows = accuracy_rows(found)
    table = Table(title="accuracy %, mean over seeds ± 95% interval")
    for column in header:
        table.add_column(column, justify="left" if column == "system" else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"report: {output / 'report.html'}", highlight=False, markup=False, soft_wrap=True)
    if failed:
        raise ArgumentError(f"{len(failed)} runs failed ({failed[0].name}, ...); {output / 'log.jsonl'} says why")


def _seed(text: str) -> int:
    from layalign.errors import ArgumentError

    if not text.strip().isdigit():
        raise ArgumentError(f"seeds: expected whole numbers with commas between, got {text.strip()!r}")
    return int(text)
