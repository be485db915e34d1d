"""The commands of `layalign` and their options; the work is in the modules each command imports."""

from __future__ import annotations

import typer

from layalign.cli import (
    analyze,
    baselines,
    bench,
    compare,
    convert,
    demo,
    doctor,
    evaluate,
    experiment,
    generate,
    serve,
    train,
    weights,
)

app = typer.Typer(
    name="layalign",
    help="LayAlign: connect a frozen multilingual encoder to a frozen LLM, train the connection and evaluate it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Each module holds the command of its name; the help lists them in this order.
for _module in (
    demo, baselines, train, experiment, evaluate, compare, analyze, generate, serve, convert, weights, doctor, bench,
):  # fmt: skip
    _name = _module.__name__.rpartition(".")[2]
    app.command(_name)(getattr(_module, _name))


@app.command(
    "lm-eval", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def _lm_eval(context: typer.Context) -> None:
    """Run EleutherAI's lm-evaluation-harness with its own arguments; --model layalign loads a LayAlign model.

    Example: layalign lm-eval --model layalign --model_args checkpoint=outputs/xnli/task --tasks xnli_sw
    """
    from layalign.evaluation.lm_eval import main

    main(context.args)


def _version(wanted: bool) -> None:
    if wanted:
        from layalign.utils.versions import package_version

        typer.echo(f"layalign {package_version()}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error; accepted anywhere."),
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
