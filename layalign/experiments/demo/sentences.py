"""The demo's sentences, written for it: pairs of a sentence and its English translation, in files of the package."""

from __future__ import annotations

from pathlib import Path

from layalign.data import Example
from layalign.experiments.analysis.pairs import read_pairs
from layalign.utils.errors import one_of

FOLDER = Path(__file__).parent / "sentences"
# "test": what is asked. "examples": what SmolLM2 alone is shown before. "train": what the short training run reads.
KINDS = ("test", "examples", "train")


def sentences(kind: str, limit: int | None = None) -> dict[str, list[Example]]:
    """The pairs of one kind by language, languages in the order of their codes.

    Args:
        kind: one of `KINDS`. The languages of "test" and "examples" are the same, and so is the English of all of them:
            row i of one language translates row i of another.
        limit: most pairs per language, from the start; at least 2.
    """
    one_of("kind", kind, KINDS)
    return read_pairs(FOLDER / kind, limit=limit)
