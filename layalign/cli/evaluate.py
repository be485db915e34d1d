"""`layalign evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layalign.cli.common import Checkpoint, Device, Dtype, listed


def evaluate(
    checkpoint: Checkpoint,
    task: Annotated[
        str,
        typer.Option(
            "--task",
            "-t",
            help="mgsm, msvamp, xnli, x-csqa, xcopa, translation, ..., or a Python file (FILE.py) that registers a "
            "task of your own. That file is run, with all your rights: read it first.",
        ),
    ],
    data: Annotated[str, typer.Option("--data", "-d", help="Test files: a folder, a file, or FORMAT:PATH.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for predictions and scores.")] = Path(
        "results"
    ),
    languages: Annotated[
        str | None,
        typer.Option("--languages", "-l", help="Names or codes with commas between. Default: all there are."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Questions answered together.")] = 8,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Default: the task's own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions of each language.")] = None,
    num_beams: Annotated[int, typer.Option(min=1, help="Beam search; the published numbers are greedy.")] = 1,
    measures: Annotated[
        str | None,
        typer.Option(
            "--measures",
            "-m",
            help="Of translation, with commas between: chrf, bleu, nats, nats-other-source, right-one-of-N. "
            "Default: chrf,bleu.",
        ),
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(
            help="number, signed-number, label, label-likelihood, label-likelihood-mean, text or translation. "
            "Default: the task's own."
        ),
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(help="task gives the LLM the prompt, translation only the source. Default: the task's own."),
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave malformed lines out and count them.")] = False,
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Answer again what an earlier run has answered.")
    ] = False,
    label_match: Annotated[str, typer.Option(help="exact (published), or start: the answer begins so.")] = "exact",
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Answer a test set in every language and count what is right, or translate it and measure how well.

    A rerun goes on where the last one stopped.

    Started by torchrun, several processes share the questions.

    Example: layalign evaluate -c outputs/math/task -t mgsm -d datas -o results/mgsm
    """
    from rich.console import Console

    from layalign.evaluation import evaluate as run
    from layalign.evaluation.tasks import find_task
    from layalign.utils.processes import Processes, join, leave

    name, _ = find_task(task)  # a wrong one is refused before the model is loaded
    console = Console()
    from layalign.modeling.loading import load_model

    result = run(
        *load_model(checkpoint, join(device), dtype),
        name,
        data,
        output,
        languages=listed(languages),
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        limit=limit,
        skip_bad=skip_bad,
        resume=not no_resume,
        scorer=scorer,
        measures=listed(measures),
        label_match=label_match,
        stage=stage,
        generation={"num_beams": num_beams} if num_beams > 1 else None,
        progress=console.is_terminal,
    )
    main = Processes().main
    leave()
    if not main:
        return
    if result.report.skipped:
        typer.echo(result.report.summary(), err=True)
    console.print(result.table())
    typer.echo(f"predictions and scores are in {output}")
