"""`layalign bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench(
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A B", help="Compare two result files (or their folders): is B slower than A?"),
    ] = None,
    threshold: Annotated[float, typer.Option(help="Ratio of B to A above which a change is reported.")] = 1.1,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write plots and report.html for the results in DIR.")
    ] = None,
) -> None:
    """Compare two benchmark results (exit code 1 if anything regressed or failed), or write a report.

    `pytest benchmarks/ --results DIR`, in a clone of the repository, writes the results.
    """
    from layalign.utils.errors import ArgumentError

    if compare is None and report is None:
        raise ArgumentError("bench: give --compare A B or --report DIR")
    if report is not None:
        from layalign.experiments.bench.report import write_report

        typer.echo(f"wrote {write_report(report)}")
    if compare is not None and _regressed(*compare, threshold):
        raise typer.Exit(1)


def _regressed(first: Path, second: Path, threshold: float) -> bool:
    """Print the table; return whether anything regressed, or failed in the second file."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    from layalign.experiments.bench import results as bench

    one, two = bench.load(first), bench.load(second)
    changes = bench.compare(one, two, threshold)
    title = escape(f"{one.commit} against {two.commit}, {one.device}, {one.shapes}")
    row, of = (Column(name, overflow="fold") for name in ("row", "of"))
    numbers = (Column(name, justify="right") for name in ("A", "B", "B / A"))
    table = Table(row, *numbers, of, "", title=title, show_edge=False)
    for change in changes:
        mark = "[red]regression[/red]" if change.regression else "[green]better[/green]" if change.improvement else ""
        values = (bench.quantity(value, change.unit) for value in (change.first, change.second))
        judged = "itself" if change.by is None else f"ours / {change.by}"
        table.add_row(escape(change.id), *values, f"{change.ratio:.3f}", escape(judged), mark)
    Console().print(table)
    only = [[name for name in a.rows if name not in b.rows] for a, b in ((one, two), (two, one))]
    failed = two.data.get("failed", [])
    for title, lines in (("only in A", only[0]), ("only in B", only[1]), ("failed in B, not measured", failed)):
        for line in lines:
            typer.echo(f"{title}: {line}")
    worse = sum(change.regression for change in changes)
    counts = f"{len(changes)} rows in both, {len(only[0])} only in A, {len(only[1])} only in B"
    typer.echo(f"{counts}: {worse} regressed, {len(failed)} failed")
    return worse > 0 or len(failed) > 0
