"""What several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ... Default: a GPU if there is one.")]
Dtype = Annotated[
    str, typer.Option("--dtype", help="Of the frozen parts: auto (as stored), float32, bfloat16 or float16.")
]


def listed(text: str | None) -> list[str] | None:
    """The names in a text with commas between them; None where the option was not given."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]
