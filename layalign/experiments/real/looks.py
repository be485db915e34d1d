"""Analysis of a trained run: `layalign analyze` on its test sentences, and properties of the encoder's layers."""

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
    """Analyze a trained run on the first sentences of every test language, and its encoder on all of them.

    Returns:
        Under "analysis" the result of :meth:`layalign.experiments.analysis.AnalysisResult.to_dict`, without attention
        and settings. Under "encoder retrieval" and "token likeness" the results of the functions of these names.
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
        # The file is published, so it contains neither sentences nor local paths.
        found["attention"], found["settings"] = None, {}
        of_encoder = model.encoder, tokenizers[0], every  # with 20 sentences, retrieval is near 100 % in most layers
        layers = {"encoder retrieval": encoder_retrieval(*of_encoder), "token likeness": token_likeness(*of_encoder)}
        return {"analysis": found, **layers}

    return after_training(settings, system, data, folder, seed, LOOKS, "looks", looked, indent=None)


def _files(folder: Path, examples: dict[str, list[Example]]) -> dict[str, Path]:
    """Write the pairs of each language into a file for `analyze`."""
    files = {}
    for language, pairs in examples.items():
        files[language] = folder / f"{language}.tsv"
        files[language].write_text("".join(f"{p.source}\t{p.target}\n" for p in pairs), encoding="utf-8")
    return files
