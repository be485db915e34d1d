"""What a trained run is like inside: `layalign analyze` on its test sentences, and the encoder's layers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from layalign.data import Example
from layalign.experiments.analysis import analyze
from layalign.experiments.analysis.encoder_layers import encoder_retrieval, token_likeness
from layalign.experiments.real.data import RealData, language_name
from layalign.experiments.real.runs import after_training, load_run, tokenizers_of
from layalign.experiments.real.settings import RealSettings, RealSystem

LOOKS = "looks.json"
PER_LANGUAGE = 20


def look_run(settings: RealSettings, system: RealSystem, data: RealData, folder: Path, seed: int) -> dict[str, Any]:
    """Look at a trained run with the first sentences of every test language, and at its encoder with all of them.

    Returns:
        Under "analysis" what :meth:`layalign.experiments.analysis.AnalysisResult.to_dict` gives, without attention and
        settings. Under "encoder retrieval" and "token likeness" what the two functions of that name give.
    """

    def looked(checkpoint: Path) -> dict[str, Any]:
        model, tokenizers = load_run(checkpoint), tokenizers_of(settings)
        every = {language_name(code): group for code, group in data.test.items()}
        with tempfile.TemporaryDirectory() as pairs:
            result = analyze(
                model, *tokenizers, _files(Path(pairs), every), limit=PER_LANGUAGE, before="untrained",
                checkpoint=checkpoint,
            )  # fmt: skip
        found = result.to_dict()
        # Neither a sentence nor a path: the file is for whoever wants to check, on any machine.
        found["attention"], found["settings"] = None, {}
        of_encoder = model.encoder, tokenizers[0], every  # of 20 sentences nearly every layer finds the right one
        layers = {"encoder retrieval": encoder_retrieval(*of_encoder), "token likeness": token_likeness(*of_encoder)}
        return {"analysis": found, **layers}

    return after_training(settings, system, data, folder, seed, LOOKS, "looks", looked, indent=None)


def _files(folder: Path, examples: dict[str, list[Example]]) -> dict[str, Path]:
    """Each language's pairs in a file, as `analyze` reads them."""
    files = {}
    for language, pairs in examples.items():
        files[language] = folder / f"{language}.tsv"
        files[language].write_text("".join(f"{p.source}\t{p.target}\n" for p in pairs), encoding="utf-8")
    return files
