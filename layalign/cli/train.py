"""`layalign train`."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layalign.utils.quiet import quiet_transformers

if TYPE_CHECKING:
    from layalign.training.config import TrainConfig


def train(
    preset: Annotated[
        str | None, typer.Option("--preset", "-p", help="math, x-csqa or xnli: the paper's set-ups.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file with the keys of TrainConfig.")
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option("--stage", "-s", help="translation, task or all. Default: all stages of the configuration."),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", "-b", help="Train a baseline instead; layalign baselines lists them.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", "-d", help="Folder in the published layout, or FORMAT:PATH such as pairs:my/tsv/folder."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Output folder; with two stages, each writes to a subfolder of its name."),
    ] = None,
    init_checkpoint: Annotated[str | None, typer.Option(help="Start from the trained parts in this folder.")] = None,
    resume: Annotated[str | None, typer.Option(help="auto (default), false to start over, or a checkpoint.")] = None,
    allow_changed: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Let a resumed run differ in this key; may be repeated.")
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any key; may be repeated.")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Check the configuration, print it in full and exit.")
    ] = False,
) -> None:
    """Train the aligner, the adapter and the gates: one stage, or both in sequence.

    Example: layalign train --preset math --data datas --set batch_size=64
    """
    from layalign.training.loading import configured_stages, load_train_config
    from layalign.utils.errors import ArgumentError

    if preset is None and config is None:
        raise ArgumentError("preset: give --preset or --config (for a small run on a laptop see layalign demo)")
    allowed = ",".join(allow_changed) if allow_changed else None
    given = (("baseline", baseline), ("data", data), ("resume", resume), ("allow_changed", allowed))
    shared = [f"{key}={value}" for key, value in given if value is not None]
    named = [*shared, *(assignments or [])]
    stages = configured_stages(config, preset=preset, overrides=named) if stage in (None, "all") else [str(stage)]
    if not stages:
        raise ArgumentError(f"baseline: {baseline} has no stage to train")
    configs: list[TrainConfig] = []
    for name in stages:
        overrides = [*shared]
        if output is not None:
            overrides.append(f"output_dir={output / name if len(stages) > 1 else output}")
        start = configs[-1].output_dir if configs else init_checkpoint
        if start is not None:
            overrides.append(f"init_checkpoint={start}")
        overrides += assignments or []
        configs.append(load_train_config(config, preset=preset, stage=name, overrides=overrides))
    if len({each.output_dir for each in configs}) < len(configs):
        raise ArgumentError(
            f"output_dir: expected one for each stage, got {configs[0].output_dir} for both; give --output, which adds "
            "a subfolder for each, or set output_dir under each of stages"
        )
    if print_config:
        for each in configs:
            typer.echo(f"# {each.stage}\n{each.to_yaml()}")
    else:
        _train_all(configs)


def _train_all(configs: list[TrainConfig]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    quiet_transformers()
    from layalign.training import is_main_process, train
    from layalign.training.runs import alone_in
    from layalign.utils.errors import StoppedError
    from layalign.utils.processes import leave

    try:
        with ExitStack() as folders:
            if is_main_process():  # logs where it writes, and in which precision
                said = logging.getLogger("layalign.training")
                folders.callback(said.setLevel, said.level)
                said.setLevel(logging.INFO)
            for config in configs:  # those of later stages too: a conflict is found before the first stage trains
                folders.enter_context(alone_in(config.output_dir))
            summaries = [(config.stage, train(config)) for config in configs]
    except StoppedError:  # all processes stop in the same step
        leave()
        raise
    leave()
    if not is_main_process():
        return
    names = ("steps", "loss before", "loss after", "seconds", "trained", "of parameters")
    table = Table("stage", *(Column(name, justify="right") for name in names), title="Training", show_edge=False)
    for name, summary in summaries:
        table.add_row(
            name,
            str(summary.steps),
            f"{summary.loss_before:.4f}",
            f"{summary.loss_after:.4f}",
            f"{summary.seconds:.1f}",
            f"{summary.trained_parameters:,}",
            f"{summary.total_parameters:,}",
        )
    Console().print(table)
    for name, summary in summaries:
        typer.echo(f"{name}: saved in {summary.output_dir}")
