"""`layalign doctor`."""

from __future__ import annotations

import typer


def doctor(
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of tables."),
) -> None:
    """Show versions, devices, the compiled extension, and each backend with the reason if it is off."""
    import json

    from layalign.cli.environment import examine

    report = examine()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    from rich.console import Console
    from rich.table import Column, Table

    missing, states = "[dim]not installed[/dim]", {True: "[green]on[/green]", False: "[yellow]off[/yellow]"}
    versions = Table("package", "version", "tested with", title="Versions", show_edge=False)
    for name, version in report["versions"].items():
        versions.add_row(name, version or missing, report["tested"].get(name, ""))
    devices = Table("device", "what", title="Devices", show_edge=False)
    for row in report["devices"].items():
        devices.add_row(*row)
    columns = (Column(name, overflow="fold") for name in ("backend", "state", "reason"))
    backends = Table(*columns, title="Backends", show_edge=False)
    for backend in report["backends"]:
        backends.add_row(backend["name"], states[backend["available"]], backend["reason"] or "")
    built = Column("what the installation built", overflow="fold")
    extension = Table("kernels", built, title="Compiled extension", show_edge=False)
    for row in report["extension"].items():
        extension.add_row(*row)
    console = Console()
    for table in (versions, devices, backends, extension):
        console.print(table)
        console.print()
