"""Extracts the text of the experiment from clones of the repositories that publish it.

`python -m layalign.experiments.real.text data --laser LASER --ntrex NTREX`
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from layalign.experiments.real.settings import load_settings
from layalign.utils.errors import ArgumentError

_BREAKS = re.compile("[\t\v\f\r\x1c-\x1e\x85\u2028\u2029]")  # tabs, and what some readers take for line breaks
PAIRS_OF_THE_OTHERS = 120  # per language that is not tested
NEWS_LINES = 150
NEWS = (
    "amh", "arb", "ben", "bul", "deu", "ell", "fra", "hau", "hin", "ibo", "ita", "jpn", "khm", "lao", "mya", "nld",
    "pol", "por", "rus", "som", "spa", "swa", "tel", "tha", "tur", "urd", "vie", "yor", "zho-CN", "zul",
)  # fmt: skip


def write_text(output: Path, laser: Path, ntrex: Path, tested: Sequence[str]) -> dict[str, int]:
    """Write ``tatoeba/XXX.tsv`` and ``ntrex/XXX.tsv``, lines of sentence, tab, English.

    Args:
        output: the folder.
        laser, ntrex: clones of facebookresearch/LASER and MicrosoftTranslator/NTREX.
        tested: languages of Tatoeba of which all pairs are written.

    Returns:
        The number of lines in each folder.

    Raises:
        ArgumentError: a clone lacks the files.
    """
    folder, news = laser / "data" / "tatoeba" / "v1", ntrex / "NTREX-128"
    sources = sorted(path for path in folder.glob("tatoeba.*-eng.*") if path.suffix != ".eng")
    if not sources:
        raise ArgumentError(f"laser: expected a clone of facebookresearch/LASER with {folder}, got {laser}")
    for path in (news / "newstest2019-src.eng.txt", *(news / f"newstest2019-ref.{code}.txt" for code in NEWS)):
        if not path.is_file():
            raise ArgumentError(f"ntrex: expected a clone of MicrosoftTranslator/NTREX with {path}, got {ntrex}")
    written = {"tatoeba": 0, "ntrex": 0}
    for path in sources:
        code = path.suffix[1:]
        pairs = _pairs(path, path.with_suffix(".eng"))
        wanted = pairs if code in tested else pairs[:PAIRS_OF_THE_OTHERS]
        written["tatoeba"] += _write(output / "tatoeba" / f"{code}.tsv", wanted)
    for code in NEWS:
        pairs = _pairs(news / f"newstest2019-ref.{code}.txt", news / "newstest2019-src.eng.txt")
        written["ntrex"] += _write(output / "ntrex" / f"{code}.tsv", pairs[:NEWS_LINES])
    return written


def _pairs(source: Path, english: Path) -> list[tuple[str, str]]:
    """The lines of both files as pairs, without those with an empty side."""
    columns = [
        [_BREAKS.sub(" ", line).strip() for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]
        for path in (source, english)
    ]
    return [(a, b) for a, b in zip(*columns, strict=True) if a and b]


def _write(path: Path, pairs: Sequence[tuple[str, str]]) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{a}\t{b}\n" for a, b in pairs), encoding="utf-8")
    return len(pairs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="the folder to write")
    parser.add_argument("--laser", type=Path, required=True, help="a clone of facebookresearch/LASER")
    parser.add_argument("--ntrex", type=Path, required=True, help="a clone of MicrosoftTranslator/NTREX")
    options = parser.parse_args(arguments)
    print(write_text(options.output, options.laser, options.ntrex, load_settings("real").tested))


if __name__ == "__main__":
    main()
