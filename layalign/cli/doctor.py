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
        typer.echo(json.dumps(report.to_dict(), indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    versions = Table(title="Versions", show_edge=False)
    versions.add_column("package")
    versions.add_column("version")
    versions.add_column("tested with")
    for name, version in report.versions.items():
        versions.add_row(name, version or "[dim]not installed[/dim]", report.tested.get(name, ""))
    devices = Table(title="Devices", show_edge=False)
    devices.add_column("device")
    devices.add_column("what")
    for name, what in report.devices.items():
        devices.add_row(name, what)
    backends = Table(title="Backends", show_edge=False)
    for column in ("backend", "state", "reason"):
        backends.add_column(column, overflow="fold")
    for backend in report.backends:
        state = "[green]on[/green]" if backend["available"] else "[yellow]off[/yellow]"
        backends.add_row(backend["name"], state, backend["reason"] or "")
    extension = Table(title="Compiled extension", show_edge=False)
    extension.add_column("kernels")
    extension.add_column("what the installation built", overflow="fold")
    for name, note in report.extension.items():
        extension.add_row(name, note)
    for table in (versions, devices, backends, extension):
        console.print(table)
        console.print()
