"""`layalign demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the page and its numbers.")] = Path(
        "demo-output"
    ),
    weights: Annotated[
        Path, typer.Option(help="Folder with encoder/ and llm/; downloaded if it does not exist.")
    ] = Path("weights"),
    checkpoint: Annotated[
        Path | None, typer.Option(help="LayAlign model for these two, instead of the shipped one.")
    ] = None,
    sentences: Annotated[int | None, typer.Option(help="Sentences per language: 2 to 12, by default 4.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the short training run, by default 12; 0: none.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the training run; with --made-up also of data and models.")] = 0,
    made_up: Annotated[
        bool,
        typer.Option("--made-up", help="Use made-up models and text instead, trained from scratch. Takes minutes."),
    ] = False,
    fast: Annotated[bool, typer.Option("--fast", help="With --made-up: tiny sizes; the numbers mean nothing.")] = False,
) -> None:
    """Try LayAlign on real models, in minutes: compare it with the LLM alone in 21 languages, train it briefly.

    Example: layalign demo, then open demo-output/demo.html
    """
    from layalign.utils.errors import ArgumentError
    from layalign.utils.quiet import quiet_transformers

    real = {"checkpoint": checkpoint, "sentences": sentences, "steps": steps}
    for name, value in real.items():
        if made_up and value is not None:
            raise ArgumentError(f"{name}: expected only without --made-up, got both")
    if fast and not made_up:
        raise ArgumentError("fast: expected only with --made-up; for a shorter demo give --sentences and --steps")
    quiet_transformers()
    if made_up:
        from layalign.experiments.made_up import run_demo as run_made_up

        run_made_up(output, seed=seed, fast=fast)
        return
    from layalign.experiments.demo import DemoOptions, run_demo
    from layalign.experiments.demo.models import SHIPPED, fetch

    numbers = {name: value for name, value in (("sentences", sentences), ("steps", steps)) if value is not None}
    options = DemoOptions(seed=seed, **numbers)
    fetch(weights)
    run_demo(output, weights, checkpoint or SHIPPED, options)
