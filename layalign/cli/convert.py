"""`layalign convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="A published pytorch_model.bin, or a folder in this library's format."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write (for a .bin), or .bin file to write (for a folder).")
    ],
    encoder: Annotated[str | None, typer.Option(help="Encoder that the published file was trained with.")] = None,
    llm: Annotated[str | None, typer.Option(help="LLM that the published file was trained with.")] = None,
) -> None:
    """Convert a published checkpoint to this library's format, or back."""
    from layalign.utils.errors import ArgumentError
    from layalign.utils.quiet import quiet_transformers

    if not source.exists():
        raise ArgumentError(f"source: no such file or folder: {source}")
    quiet_transformers()
    from layalign.published.convert import convert_published, convert_to_published

    if source.is_dir():
        if output.is_dir():
            raise ArgumentError(f"output: expected a file such as pytorch_model.bin, {output} is a folder")
        report = convert_to_published(source, output)
    else:
        if encoder is None or llm is None:
            missing = "encoder" if encoder is None else "llm"
            raise ArgumentError(f"{missing}: a published file does not name its {missing}; give --{missing}")
        report = convert_published(source, encoder, llm, output)
    extra = ", encoder and LLM with them" if report.frozen_saved else ""
    typer.echo(f"wrote {report.output}: {report.weights} tensors{extra}")
