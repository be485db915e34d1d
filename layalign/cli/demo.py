"""`layalign demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for models, predictions and the report.")]
Seed = Annotated[int, typer.Option("--seed", help="Of data, models and training.")]
Fast = Annotated[bool, typer.Option("--fast", help="Tiny sizes: see it run; the numbers mean nothing.")]


def demo(output: Output = Path("demo-output"), seed: Seed = 0, fast: Fast = False) -> None:
    """The whole method, small: pre-train tiny parts, train both stages, compare, write a report. Takes minutes."""
    from layalign.cli.common import quiet_transformers
    from layalign.demo import run_demo

    quiet_transformers()
    run_demo(output, seed=seed, fast=fast)
