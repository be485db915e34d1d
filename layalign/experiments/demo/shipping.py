"""Makes the checkpoint that ships with the package from a run of `layalign experiment --preset real`.

python -m layalign.experiments.demo.shipping EVIDENCE --data DATA --weights weights
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from layalign.data.languages import language_of
from layalign.experiments.demo.models import ABOUT, SHIPPED
from layalign.experiments.engine import run_folder
from layalign.experiments.real.data import read_data
from layalign.experiments.real.runs import TRAINED, work_folder
from layalign.experiments.real.settings import RealSettings, load_settings
from layalign.experiments.weights.hub import MODELS
from layalign.modeling.encoders import load_encoder, load_llm
from layalign.modeling.model import LayAlignForCausalLM
from layalign.modeling.names import PARTS
from layalign.training.gates import FILE as GATES
from layalign.utils.errors import ArgumentError
from layalign.utils.files import write_whole
from layalign.utils.reading import read_json

CARD = "README.md"
COMMAND = "layalign experiment --preset real"


def ship(
    settings: RealSettings, evidence: Path, folder: Path, system: str, seed: int, beside: Sequence[str] = ()
) -> dict[str, Any]:
    """Write the trained weights of a run with the hub's names of the frozen parts, `about.json` and a model card.

    Args:
        settings: settings of the experiment; its weights must be identical to those of the run.
        evidence: the experiment's folder, with the run's checkpoint.
        folder: folder for the checkpoint; existing content is replaced.
        system, seed: the run.
        beside: other systems whose dev losses with the same seed are included.

    Returns:
        The content of `about.json`.

    Raises:
        ArgumentError: a run is missing or not finished.
        CheckpointError: the checkpoint cannot be read, or its frozen parts differ.
    """
    trained = {name: _trained(evidence, name, seed) for name in (system, *beside)}
    weights = Path(settings.weights)
    encoder, llm = load_encoder(str(weights / "encoder")), load_llm(str(weights / "llm"))
    run = work_folder(evidence, system, seed, trained[system]["learning_rate"])
    model = LayAlignForCausalLM.from_pretrained(run, encoder=encoder, llm=llm)
    model.config.encoder_config, model.config.llm_config = encoder.config, llm.config
    for part in PARTS:
        setattr(model.config, f"{part}_name_or_path", MODELS[part].name)
        getattr(model.config, f"{part}_config")._name_or_path = MODELS[part].name  # not a local path
    pairs = Counter(pair.language for pair in read_data(settings).train)
    if folder.is_dir():
        shutil.rmtree(folder)
    model.save_pretrained(folder)
    if (run / GATES).is_file():
        shutil.copyfile(run / GATES, folder / GATES)
    labels = {name: settings.system(name).label for name in trained}
    steps, scheduled = trained[system]["steps"], settings.system(system).steps(settings)
    taken = f"{steps:,}" if steps == scheduled else f"{steps:,} of {scheduled:,}"
    about = {
        "what": f"{taken} steps of {settings.batch} pairs, learning rate {trained[system]['learning_rate']:g}; "
        "dev loss, on pairs whose English is in no training pair.",
        "text": f"{sum(pairs.values()):,} sentence pairs of Tatoeba in {len(pairs)} languages, everyday sentences.",
        "command": f"{COMMAND} --only {system} --seeds {seed}",
        "pairs": dict(sorted(pairs.items())),
        # dict(): the last step may be recorded twice, because the end of a run measures it again.
        "curves": {labels[name]: [list(p) for p in dict(one["dev_losses"]).items()] for name, one in trained.items()},
    }
    write_whole(folder / ABOUT, json.dumps(about, ensure_ascii=False, indent=1) + "\n")
    unseen = [language_of(code).name for code in settings.unseen]
    write_whole(folder / CARD, _card(model, about, trained[system]["dev_loss"], unseen))
    return about


def _trained(evidence: Path, system: str, seed: int) -> dict[str, Any]:
    """The experiment's record of a trained run."""
    file = run_folder(evidence, system, seed) / TRAINED
    if not file.is_file():
        raise ArgumentError(f"evidence: expected a trained run of {system} with seed {seed}, got none: no {file}")
    return dict(read_json(file))


def _card(model: Any, about: Mapping[str, Any], dev_loss: float, unseen: Sequence[str]) -> str:
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    names = {part: MODELS[part].name for part in PARTS}
    return f"""# LayAlign over multilingual-e5-small and SmolLM2-135M-Instruct

Adapter, aligner and gates: {count:,} trained parameters. They join two frozen models, {names["encoder"]} (MIT) and
{names["llm"]} (Apache-2.0), of which no weight is in this folder. They were trained over the 4-bit weights that
`layalign weights --source packages` writes; over the hub's weights loading warns that the parts differ.

- **Use.** Translation of short everyday sentences into English, to show and to study the method: `layalign demo`, or
  `LayAlignForCausalLM.from_pretrained(folder, encoder=..., llm=...)` with both parts loaded from `layalign weights`.
- **Training.** The translation stage only, by `{about["command"]}`.
  {about["what"]}
  Dev loss at the end {dev_loss:.2f} nats a token; `about.json` has the curve.
- **Text.** {about["text"]}
  `about.json` has their number by language. None of them is shipped. No pairs in {", ".join(unseen)}, whose text the
  encoder read in its own training.
- **Limits.** A language model of 135 M parameters and a short training run: many answers are wrong, and fluent when
  they are. Long sentences, names and numbers suffer most. Not for use where a mistranslation matters. What the frozen
  models learned, biases included, comes along.
- **Licence.** That of layalign, for the trained weights.
"""


def main(
    evidence: Annotated[Path, typer.Argument(help="Folder of the experiment.")],
    data: Annotated[Path, typer.Option(help="Folder with its text.")] = Path("data"),
    weights: Annotated[Path, typer.Option(help="Folder with encoder/ and llm/.")] = Path("weights"),
    system: Annotated[str, typer.Option(help="System of the run.")] = "layalign-all-long",
    seed: Annotated[int, typer.Option(help="Seed of the run.")] = 0,
    beside: Annotated[str, typer.Option(help="Other systems whose dev losses are included, separated by commas.")] = "",
    folder: Annotated[Path, typer.Option(help="Folder for the checkpoint.")] = SHIPPED,
) -> None:
    """Write the checkpoint that ships with the package."""
    settings = load_settings("real", {"data": str(data), "weights": str(weights)})
    ship(settings, evidence, folder, system, seed, [name for name in beside.split(",") if name])


if __name__ == "__main__":
    typer.run(main)
