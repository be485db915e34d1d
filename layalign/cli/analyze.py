"""`layalign analyze`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from layalign.cli.common import Device, Dtype, listed


def analyze(
    checkpoint: Annotated[str, typer.Argument(help="Folder or hub name of a trained model.")],
    pairs: Annotated[
        list[str],
        typer.Option(
            "--pairs",
            "-p",
            help="LANGUAGE=FILE of lines source<TAB>english, or a folder of LANGUAGE.tsv; may be repeated.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for report.html, analysis.json and PNG files.")
    ] = Path("analysis"),
    languages: Annotated[
        str | None,
        typer.Option("--languages", "-l", help="Names or codes, separated by commas. Default: all in --pairs."),
    ] = None,
    limit: Annotated[int, typer.Option(help="Maximum number of sentences per language.")] = 200,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Sentences per batch.")] = 8,
    max_length: Annotated[int, typer.Option(min=1, help="Maximum length of a sentence in tokens.")] = 256,
    before: Annotated[
        str | None,
        typer.Option(help="Also compare with another checkpoint, or with 'untrained': this model with new weights."),
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Hidden state for PCA and t-SNE. Default: the middle one.")] = None,
    sentence: Annotated[str, typer.Option(help="Sentence to show attention for: N, from 1, or LANGUAGE:N.")] = "1",
    generate: Annotated[
        int, typer.Option(min=0, help="Show attention for a generated answer of N tokens; 0: for the English.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of t-SNE, shuffled pairs and untrained weights.")] = 0,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Show what a model has learned: mix weights, gates, attention, and how similar X and English are inside the LLM.

    Example: layalign analyze outputs/math/task -p sw=dev/sw.tsv -p de=dev/de.tsv -o results/analysis
    """
    from rich.console import Console

    from layalign.experiments.analysis import analyze as run
    from layalign.experiments.analysis import read_pairs

    names = listed(languages)
    language, number = _sentence(sentence)
    read_pairs(pairs, languages=names, limit=limit)  # fails before a large model is loaded
    console = Console()
    from layalign.modeling.loading import load_model

    result = run(
        *load_model(checkpoint, device, dtype),
        pairs,
        output,
        languages=names,
        limit=limit,
        batch_size=batch_size,
        max_length=max_length,
        before=_before(before, device, dtype),
        layer=layer,
        sentence=number,
        sentence_language=language,
        generate=generate,
        checkpoint=checkpoint,
        seed=seed,
        progress=console.is_terminal,
    )
    console.print(result.table())
    typer.echo(f"the report is {output / 'report.html'}")


def _sentence(text: str) -> tuple[str | None, int]:
    """Split "N" or "LANGUAGE:N" into (language or None, number)."""
    from layalign.utils.errors import ArgumentError

    language, _, number = text.rpartition(":")
    if not number.strip().isdigit():
        raise ArgumentError(f"sentence: expected a number or LANGUAGE:NUMBER, got {text!r}")
    return language.strip() or None, int(number)


def _before(before: str | None, device: str | None, dtype: str) -> Any:
    """Load what `--before` names."""
    from layalign.utils.errors import ArgumentError

    if before is None or before == "untrained":
        return before
    if not Path(before).exists() and before.count("/") != 1:
        raise ArgumentError(f"before: expected 'untrained' or a checkpoint, got {before}, which is no folder")
    from layalign.modeling.loading import load_model

    return load_model(before, device, dtype)[0]
