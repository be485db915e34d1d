"""The parallel text of an analysis: one TSV file per language, each line `source<TAB>english`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from layalign.data import Example, load_examples
from layalign.data.languages import find_language
from layalign.data.readers import language_of_path
from layalign.utils.errors import ArgumentError, refuse, whole_number

Pairs = str | Path | Sequence[str | Path] | Mapping[str, str | Path]
FEWEST = 2


def read_pairs(
    pairs: Pairs, *, languages: Sequence[str] | None = None, limit: int | None = None
) -> dict[str, list[Example]]:
    """Read the sentences of every language with their English translations.

    Args:
        pairs: "NAME=FILE", a TSV file or a folder of TSV files named after their languages, or several of these; or a
            mapping of language names to files. NAME is a language's name or code.
        languages: names or codes to keep, in this order; None keeps all.
        limit: maximum number of sentences per language, from the start of the file.

    Returns:
        The examples in file order, by the English name of their language.

    Raises:
        ArgumentError: a language is unknown, named twice, English or missing, or has fewer than two sentences.
        DataError: a file is missing or has a malformed line ("file:line: what, expected what").
    """
    if limit is not None and whole_number("limit", limit) < FEWEST:
        raise ArgumentError(f"limit: expected a number >= {FEWEST}, got {limit}")
    if languages is not None and (isinstance(languages, str) or not isinstance(languages, Sequence)):
        refuse("languages", "a list of names or codes", languages)
    files = _files(pairs)
    if languages is not None:
        wanted = list(dict.fromkeys(_known("languages", language) for language in languages))
        missing = [name for name in wanted if name not in files]
        if missing or not wanted:
            raise ArgumentError(f"languages: expected some of {', '.join(files)}, got {', '.join(missing) or 'none'}")
        files = {name: files[name] for name in wanted}
    found = {}
    for name, file in files.items():
        examples, _ = load_examples({"format": "pairs", "path": str(file), "language": name, "limit": limit})
        if len(examples) < FEWEST:
            raise ArgumentError(f"pairs: expected at least {FEWEST} sentences of {name}, got {len(examples)} in {file}")
        found[name] = examples
    return found


def _known(argument: str, text: str) -> str:
    language = find_language(text) if isinstance(text, str) else None
    if language is None:
        refuse(argument, "the name or code of a known language", text)
    return language.name


def _files(pairs: Pairs) -> dict[str, Path]:
    """Language name -> file."""
    files = pairs.values() if isinstance(pairs, Mapping) else [pairs] if isinstance(pairs, str | Path) else pairs
    listed = isinstance(pairs, Mapping | Sequence | Path) and not isinstance(pairs, bytes)
    if not listed or not all(isinstance(file, str | Path) for file in files):
        refuse("pairs", "NAME=FILE, a TSV file or a folder of them, or several", pairs)
    if isinstance(pairs, Mapping):
        named = [(name, Path(file)) for name, file in pairs.items()]
    else:
        parts = [pairs] if isinstance(pairs, str | Path) else list(pairs)
        named = [pair for part in parts for pair in _named(str(part))]
    by_name: dict[str, Path] = {}
    for given, file in named:
        name = _known("pairs", given)
        if name in by_name:
            raise ArgumentError(f"pairs: expected one file for {name}, got {by_name[name]} and {file}")
        if name == "English":
            raise ArgumentError(f"pairs: expected languages other than English, got {file}")
        if not file.is_file():
            raise ArgumentError(f"pairs: expected a file for {name}, got {file}, which does not exist")
        by_name[name] = file
    if not by_name:
        raise ArgumentError("pairs: expected NAME=FILE or a folder of TSV files, got none")
    return by_name


def _named(part: str) -> list[tuple[str, Path]]:
    name, sign, file = part.partition("=")
    if sign and "/" not in name:
        return [(name.strip(), Path(file))]
    path = Path(part)
    paths = sorted(path.glob("*.tsv")) if path.is_dir() else [path]
    if path.is_dir() and not paths:
        raise ArgumentError(f"pairs: expected a folder with TSV files, got {path} without any")
    if not path.exists():
        raise ArgumentError(f"pairs: expected NAME=FILE, a TSV file or a folder of them, got {path} (does not exist)")
    named = []
    for each in paths:
        language = language_of_path(each)
        if language is None:
            raise ArgumentError(f"pairs: expected a file named after its language, or NAME={each}, got {each.name}")
        named.append((language.name, each))
    return named
