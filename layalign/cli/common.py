"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Checkpoint = Annotated[str, typer.Option("--checkpoint", "-c", help="Folder or hub name of a trained model.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ... Default: a GPU if available.")]
Dtype = Annotated[
    str, typer.Option("--dtype", help="Dtype of the frozen parts: auto (as stored), float32, bfloat16 or float16.")
]


def listed(text: str | None) -> list[str] | None:
    """Split a comma-separated option into names; None if it was not given."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]
