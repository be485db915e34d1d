"""`layalign baselines`."""

from __future__ import annotations


def baselines() -> None:
    """List the methods and ablations that LayAlign can be compared with; each is a set of settings of the model."""
    from rich.console import Console
    from rich.table import Column, Table

    from layalign.training.baselines import BASELINES

    columns = (Column(name, overflow="fold") for name in ("name", "what it is", "stages", "source"))
    table = Table(*columns, title="layalign train --baseline NAME", show_lines=True)
    for entry in BASELINES.values():
        table.add_row(entry.name, entry.what, ", ".join(entry.stages) or "none", entry.source)
    Console().print(table)
