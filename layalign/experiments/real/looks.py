"""What a trained run is like inside: `layalign analyze` on its test sentences, and the encoder's layers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from layalign._lock import held
from layalign.analysis import analyze
from layalign.analysis.encoder_layers import encoder_retrieval, token_likeness
from layalign.data import Example
from layalign.experiment.runs import log, read_done
from layalign.experiments.real.data import RealData, language_name
from layalign.experiments.real.runs import (
    load_run,
    run_folder,
    tokenizers_of,
    trained_folder,
    translation,
    write_done,
)
from layalign.experiments.real.settings import RealSettings, RealSystem

LOOKS = "looks.json"
PER_LANGUAGE = 20


def look_run(settings: RealSettings, system: RealSystem, data: RealData, folder: Path, seed: int) -> dict[str, Any]:
    """Look at a trained run with the first sentences of every test language, and at its encoder with all of them.

    Returns:
        Under "analysis" what :meth:`layalign.analysis.AnalysisResult.to_dict` gives, without attention and settings.
        Under "encoder retrieval" and "token likeness" what the two functions of that name give.
    """
    place, mark = run_folder(folder, system.name, seed), settings.test_fingerprint(system, data.test_mark)
    if (done := read_done(place / LOOKS, mark)) is not None:
        return done
    checkpoint = trained_folder(translation(settings, system, data), folder, seed)
    with held(place, "output"):
        log(folder, "looks", system=system.name, seed=seed)
        model, tokenizers = load_run(settings, checkpoint), tokenizers_of(settings)
        shown = {language_name(code): group[:PER_LANGUAGE] for code, group in data.test.items()}
        with tempfile.TemporaryDirectory() as pairs:
            result = analyze(
                model, *tokenizers, _files(Path(pairs), shown), limit=None, before="untrained", checkpoint=checkpoint
            )
        found = result.to_dict()
        # Neither a sentence nor a path: the file is for whoever wants to check, on any machine.
        found["attention"], found["settings"] = None, {}
        # All sentences: of 20 nearly every layer finds the right one.
        of_encoder = model.encoder, tokenizers[0], {language_name(code): group for code, group in data.test.items()}
        layers = {"encoder retrieval": encoder_retrieval(*of_encoder), "token likeness": token_likeness(*of_encoder)}
        return write_done(place / LOOKS, mark, {"analysis": found, **layers}, indent=None)


def _files(folder: Path, examples: dict[str, list[Example]]) -> dict[str, Path]:
    """Each language's pairs in a file, as `analyze` reads them."""
    files = {}
    for language, pairs in examples.items():
        files[language] = folder / f"{language}.tsv"
        files[language].write_text("".join(f"{p.source}\t{p.target}\n" for p in pairs), encoding="utf-8")
    return files
