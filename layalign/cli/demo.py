"""`layalign demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the page and its numbers.")]
Weights = Annotated[
    Path, typer.Option("--weights", help="Folder with encoder/ and llm/; downloaded if it does not exist.")
]
Checkpoint = Annotated[
    Path | None, typer.Option("--checkpoint", help="LayAlign model for these two, instead of the shipped one.")
]
Sentences = Annotated[int | None, typer.Option("--sentences", help="Sentences per language: 2 to 12, by default 4.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Steps of the short training run, by default 12; 0: none.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the training run; with --made-up also of data and models.")]
MadeUp = Annotated[
    bool, typer.Option("--made-up", help="Use made-up models and text instead, trained from scratch. Takes minutes.")
]
Fast = Annotated[bool, typer.Option("--fast", help="With --made-up: tiny sizes; the numbers mean nothing.")]


def demo(
    output: Output = Path("demo-output"),
    weights: Weights = Path("weights"),
    checkpoint: Checkpoint = None,
    sentences: Sentences = None,
    steps: Steps = None,
    seed: Seed = 0,
    made_up: MadeUp = False,
    fast: Fast = False,
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
