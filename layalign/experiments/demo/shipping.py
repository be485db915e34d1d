"""From a training run's checkpoint to the one that ships with the package: the trained weights, a card, the curves.

python -m layalign.experiments.demo.shipping RUN --weights weights --data pairs:FOLDER --compare "NAME=RUN"
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from layalign._files import write_whole
from layalign.data import load_examples
from layalign.encoder import load_encoder, load_llm
from layalign.errors import CheckpointError
from layalign.experiments.demo.models import ABOUT, SHIPPED
from layalign.experiments.weights.hub import MODELS
from layalign.model import LayAlignForCausalLM
from layalign.names import PARTS
from layalign.training.gates import FILE as GATES
from layalign.training.runs import RUN_FILE

CARD = "README.md"


def ship(
    run: Path,
    folder: Path,
    weights: Path,
    *,
    text: str,
    command: str,
    data: Any = None,
    compare: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    """Write the trained weights of a run with the hub's names of the frozen parts, `about.json` and a model card.

    Args:
        run: folder that training wrote.
        folder: gets the checkpoint; what is there is replaced.
        weights: folder with `encoder` and `llm`; they must be those of the run, to the bit.
        text: what it was trained on, and where that is from.
        command: that trained it.
        data: the training text as `TrainConfig.data` names it, to count pairs by language; None: not counted.
        compare: by name, runs whose dev loss is shown beside.

    Returns:
        What `about.json` holds.

    Raises:
        CheckpointError: the run cannot be read, or its frozen parts were others.
    """
    encoder, llm = load_encoder(str(weights / "encoder")), load_llm(str(weights / "llm"))
    model = LayAlignForCausalLM.from_pretrained(run, encoder=encoder, llm=llm)
    model.config.encoder_config, model.config.llm_config = encoder.config, llm.config
    for part in PARTS:
        setattr(model.config, f"{part}_name_or_path", MODELS[part].name)
    if folder.is_dir():
        shutil.rmtree(folder)
    model.save_pretrained(folder)
    if (run / GATES).is_file():
        shutil.copyfile(run / GATES, folder / GATES)
    curves = {"this checkpoint": _curve(run)} | {name: _curve(other) for name, other in (compare or {}).items()}
    pairs = None if data is None else dict(sorted(load_examples(data)[1].counts.items()))
    steps = max((step for step, _ in curves["this checkpoint"]), default=0)
    about = {
        "what": f"{steps} steps; dev loss on pairs whose English is in no training pair, the same for all curves.",
        "text": text, "command": command, "steps": steps, "pairs": pairs,
        "curves": {name: curve for name, curve in curves.items() if curve},
    }  # fmt: skip
    write_whole(folder / ABOUT, json.dumps(about, ensure_ascii=False, indent=1) + "\n")
    write_whole(folder / CARD, _card(model, about))
    return about


def _curve(run: Path) -> list[tuple[int, float]]:
    """(step, dev loss) of a run; none where it kept no record."""
    file = run / RUN_FILE
    if not file.is_file():
        return []
    try:
        history = json.loads(file.read_text(encoding="utf-8"))["log_history"]
        return [(entry["step"], round(entry["eval_loss"], 4)) for entry in history if "eval_loss" in entry]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: expected log_history with eval_loss: {error!r}") from error


def _card(model: Any, about: Mapping[str, Any]) -> str:
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    pairs = about["pairs"] or {}
    counted = f" {sum(pairs.values()):,} pairs in {len(pairs)} languages." if pairs else ""
    curve = about["curves"].get("this checkpoint")
    loss = f" Dev loss {curve[-1][1]:.2f} nats a token after {curve[-1][0]} steps." if curve else ""
    names = {part: MODELS[part].name for part in PARTS}
    return f"""# LayAlign over multilingual-e5-small and SmolLM2-135M-Instruct

Adapter, aligner and gates: {trained:,} trained parameters. They join two frozen models, {names["encoder"]} (MIT) and
{names["llm"]} (Apache-2.0), of which no weight is in this folder. They were trained over the 4-bit weights that
`layalign weights --source packages` writes; over the hub's weights loading warns that the parts differ.

- **Use.** Translation of short everyday sentences into English, to show and to study the method. `layalign demo`, or
  `LayAlignForCausalLM.from_pretrained(folder, encoder=..., llm=...)` with both parts loaded from `layalign weights`.
- **Training.** The translation stage only. `{about["command"]}`.{loss}
- **Text.** {about["text"]}{counted} `about.json` has the pairs of each language and the dev losses.
- **Limits.** A language model of 135 M parameters, one short training run: many answers are wrong, and fluent when they
  are. Long sentences, names, numbers and questions suffer most. Not for use where a mistranslation matters. What the
  frozen models learned, biases included, comes along.
- **Licence.** That of layalign, for the trained weights.
"""


def main(
    run: Annotated[Path, typer.Argument(help="Folder that training wrote.")],
    weights: Annotated[Path, typer.Option(help="Folder with encoder/ and llm/.")] = Path("weights"),
    folder: Annotated[Path, typer.Option(help="Gets the checkpoint.")] = SHIPPED,
    text: Annotated[str, typer.Option(help="What it was trained on.")] = "Sentence pairs of Tatoeba.",
    command: Annotated[str, typer.Option(help="What trained it.")] = "layalign train",
    data: Annotated[str | None, typer.Option(help="The training text, to count pairs by language.")] = None,
    compare: Annotated[list[str] | None, typer.Option(help="NAME=RUN whose dev loss is shown beside.")] = None,
) -> None:
    """Write the checkpoint that ships with the package."""
    others = {name: Path(other) for name, other in (each.split("=", 1) for each in compare or [])}
    ship(run, folder, weights, text=text, command=command, data=data, compare=others)


if __name__ == "__main__":
    typer.run(main)
