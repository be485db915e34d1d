"""`layalign experiment`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from layalign.experiments.settings import Run


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
    from rich.console import Console

    from layalign.cli.common import listed
    from layalign.experiments.pages import terminal_table
    from layalign.experiments.real.settings import is_real
    from layalign.utils.errors import ArgumentError
    from layalign.utils.quiet import quiet_transformers

    quiet_transformers()
    numbers = None if seeds is None else [_seed(text) for text in seeds.split(",")]
    kind = "real" if is_real(config) else "controlled"
    changes = {name: str(folder) for name, folder in (("weights", weights), ("data", data)) if folder is not None}
    stages = {} if stage is None else {"stage": stage}
    if kind != "real" and (given := next(iter(changes | stages), None)):
        raise ArgumentError(f"{given}: expected none with {config}, it is only for the preset real")
    settings_of, schedule, results, pages = (
        import_module(f"layalign.experiments.{kind}.{name}") for name in ("settings", "schedule", "results", "report")
    )
    settings = settings_of.load_settings(config, changes)

    def tell(run: Run, seconds: float, problem: str | None) -> None:
        text = f"done in {seconds:.0f} s" if problem is None else f"failed: {problem}"
        typer.echo(f"{run.name}: {text}")

    failed = []
    if not report:
        failed = schedule.run_all(settings, output, only=listed(only), seeds=numbers, jobs=jobs, tell=tell, **stages)
    found = results.write_results(settings, output)
    pages.write_report(output, found)
    Console().print(terminal_table(*pages.headline(found)))
    typer.echo(f"report: {output / pages.PAGE}")
    if failed:
        raise ArgumentError(f"{len(failed)} runs failed ({failed[0].name}, ...); see {output / 'log.jsonl'}")


def _seed(text: str) -> int:
    from layalign.utils.errors import ArgumentError

    if not text.strip().isdigit():
        raise ArgumentError(f"seeds: expected whole numbers separated by commas, got {text.strip()!r}")
    return int(text)
