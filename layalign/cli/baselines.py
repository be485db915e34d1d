"""`layalign baselines`."""

from __future__ import annotations


def baselines() -> None:
    """List what LayAlign can be compared with: methods and ablations, each as settings of the one model."""
    from rich.console import Console
    from rich.table import Table

    from layalign.training.baselines import BASELINES

    table = Table(title="layalign train --baseline NAME", show_lines=True)
    for column in ("name", "what it is", "stages", "source"):
        table.add_column(column, overflow="fold")
    for entry in BASELINES.values():
        table.add_row(entry.name, entry.what, ", ".join(entry.stages) or "none", entry.source)
    Console().print(table)
