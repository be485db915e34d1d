"""`layalign experiment`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer


def experiment(
    config: Annotated[
        str,
        typer.Option("--config", "--preset", "-c", help="A .yaml file, or a preset: controlled, larger, smoke, real."),
    ] = "controlled",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything; a rerun resumes it.")] = Path(
        "experiment-output"
    ),
    only: Annotated[str | None, typer.Option(help="Run only these systems, separated by commas.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Run only these seeds, separated by commas.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Runs in parallel; they share the CPU cores.")] = 1,
    report: Annotated[bool, typer.Option("--report", help="Only write the report of the finished runs.")] = False,
    stage: Annotated[str | None, typer.Option(help="With --preset real: only translation, or only task.")] = None,
    weights: Annotated[Path | None, typer.Option(help="With --preset real: the folder of layalign weights.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="With --preset real: the folder with the text (docs/evidence.md).")
    ] = None,
) -> None:
    """Compare LayAlign with its baselines over several seeds: on generated problems, or on real models. Takes hours.

    Example: layalign experiment --only layalign,mindmerger-soft --seeds 0
    Example: layalign experiment --preset real --weights weights --data data --output evidence
    """
    from layalign.cli.common import listed
    from layalign.experiments.real.settings import is_real
    from layalign.utils.errors import ArgumentError
    from layalign.utils.quiet import quiet_transformers

    quiet_transformers()
    numbers = None if seeds is None else [_seed(text) for text in seeds.split(",")]
    options: dict[str, Any] = {"only": listed(only), "seeds": numbers, "jobs": jobs}
    if is_real(config):
        changes = {name: str(value) for name, value in (("weights", weights), ("data", data)) if value is not None}
        failed = _real(config, changes, output, report, {**options, "stage": stage})
    else:
        for name, value in (("weights", weights), ("data", data), ("stage", stage)):
            if value is not None:
                raise ArgumentError(f"{name}: expected none with {config}, it is only for the preset real")
        failed = _controlled(config, output, report, options)
    if failed:
        raise ArgumentError(f"{len(failed)} runs failed ({failed[0]}, ...); see {output / 'log.jsonl'}")


def _controlled(config: str, output: Path, report: bool, options: dict[str, Any]) -> list[str]:
    from layalign.experiments.controlled import load_settings
    from layalign.experiments.controlled.report import accuracy_rows, write_report
    from layalign.experiments.controlled.results import write_results
    from layalign.experiments.controlled.schedule import Task, run_all
    from layalign.utils.errors import ArgumentError

    settings = load_settings(config)

    def tell(task: Task, seconds: float, problem: str | None) -> None:
        text = f"{seconds:.0f} s" if problem is None else f"failed: {problem}"
        typer.echo(f"{task.name}: {text}")

    failed = [] if report else run_all(settings, output, tell=tell, **options)
    if not any((output / "runs").glob("*/*/result.json")):
        raise ArgumentError(f"output: no finished run in {output}")
    found = write_results(settings, output)
    write_report(output, found)
    _print_table("accuracy %, mean over seeds ± 95% interval", accuracy_rows(found))
    typer.echo(f"report: {output / 'report.html'}")
    return [task.name for task in failed]


def _real(config: str, changes: dict[str, str], output: Path, report: bool, options: dict[str, Any]) -> list[str]:
    from layalign.experiments.real.report import main_rows, write_report
    from layalign.experiments.real.results import write_results
    from layalign.experiments.real.schedule import Run, run_all
    from layalign.experiments.real.settings import load_settings

    settings = load_settings(config, changes)

    def tell(run: Run, problem: str | None) -> None:
        text = "done" if problem is None else f"failed: {problem}"
        typer.echo(f"{_name(run)}: {text}")

    failed = [] if report else run_all(settings, output, tell=tell, **options)
    found = write_results(settings, output)
    write_report(output, found)
    _print_table("test sentences of Tatoeba, mean over languages and seeds [95% interval]", main_rows(found))
    typer.echo(f"report: {output / 'report.md'}")
    return [_name(run) for run in failed]


def _name(run: tuple[str, str, int]) -> str:
    return f"{run[0]}, {run[1]}, seed {run[2]}"


def _print_table(title: str, rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    header, *others = rows
    columns = (Column(name, justify="left" if name == "system" else "right") for name in header)
    table = Table(*columns, title=title)
    for row in others:
        table.add_row(*row)
    Console().print(table)


def _seed(text: str) -> int:
    from layalign.utils.errors import ArgumentError

    if not text.strip().isdigit():
        raise ArgumentError(f"seeds: expected whole numbers separated by commas, got {text.strip()!r}")
    return int(text)
