"""`layalign compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="Output folder of the baseline's evaluation.")],
    run_b: Annotated[
        Path, typer.Argument(metavar="RUN_B", help="Output folder of another evaluation of the same data.")
    ],
    by: Annotated[str, typer.Option(help="Rows of the table: language, or level (resource level).")] = "language",
    grouping: Annotated[str, typer.Option(help="Levels to use: joshi, or paper (MGSM and MSVAMP only).")] = "joshi",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write all results to.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
) -> None:
    """Compare two evaluations answer by answer: exact McNemar tests and bootstrap intervals of the difference.

    Translations are compared by each metric that both runs have, with a paired bootstrap over sentences.

    Example: layalign compare results/baseline results/layalign --by level

    For benchmark results see layalign bench --compare.
    """
    import json

    from rich.console import Console

    from layalign.evaluation.compare import compare_runs
    from layalign.utils.files import write_whole

    comparison = compare_runs(run_a, run_b, seed=seed)
    table = comparison.table(by, grouping)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False) + "\n")
    Console().print(table)
    for name, alone in (("A", comparison.only_in_a), ("B", comparison.only_in_b)):
        if alone:
            typer.echo(f"only in {name}, left out: {', '.join(alone)}")
    if comparison.settings:
        typer.echo(f"settings that differ: {', '.join(comparison.settings)}")
