"""The demo's sentences: pairs of a sentence and its English translation, written for it, in files of the package."""

from __future__ import annotations

from pathlib import Path

from layalign.data import Example
from layalign.experiments.analysis.pairs import read_pairs
from layalign.utils.errors import one_of

FOLDER = Path(__file__).parent / "sentences"
# "test": the questions. "examples": in the prompt of the LLM alone. "train": for the short training run.
KINDS = ("test", "examples", "train")


def sentences(kind: str, limit: int | None = None) -> dict[str, list[Example]]:
    """The pairs of one kind by language, in the order of the languages' codes.

    Args:
        kind: one of `KINDS`. "test" and "examples" have the same languages, and within each of the two, row i of every
            language has the same English.
        limit: maximum number of pairs per language, from the start; at least 2.
    """
    one_of("kind", kind, KINDS)
    return read_pairs(FOLDER / kind, limit=limit)
