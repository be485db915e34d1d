"""Splits the text into train, dev and test, by the English side and across all languages."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layalign.data import Example
from layalign.data.languages import find_language, language_of
from layalign.data.readers import load_examples
from layalign.data.sentences import sentence_key
from layalign.experiments.real.settings import RealSettings
from layalign.experiments.settings import digest
from layalign.utils.errors import ArgumentError

_SPLIT_SEED = 0


@dataclass(frozen=True)
class RealData:
    """The text of the experiment.

    Attributes:
        train: pairs of all languages except the unseen ones, without the English sentences of dev and test.
        dev: pairs of the tested languages that are seen in training.
        test: pairs by Tatoeba file name.
        other_domain: pairs by NTREX file name; empty without that folder.
        shots: five pairs by Tatoeba file name, neither in dev nor in test.
        facts: counts, and checksums of the files.
    """

    train: list[Example]
    dev: list[Example]
    test: dict[str, list[Example]]
    other_domain: dict[str, list[Example]]
    shots: dict[str, list[Example]]
    facts: dict[str, Any]

    @property
    def mark(self) -> str:
        """A fingerprint of train and dev."""
        return f"{self.facts['train']['of']} {self.facts['dev']['of']}"

    def to_json(self) -> str:
        """Counts and checksums, no text."""
        return json.dumps(self.facts, indent=1) + "\n"

    @property
    def test_mark(self) -> str:
        """A fingerprint of all of the text."""
        return digest(self.facts)


def read_data(settings: RealSettings) -> RealData:
    """Read and split the text, in the same way for every system and seed.

    Raises:
        ArgumentError: a folder or the file of a tested language is missing, or has too few sentences.
        DataError: a malformed line.
    """
    root = Path(settings.data)
    files = sorted((root / "tatoeba").glob("*.tsv"))
    if missing := [code for code in settings.tested if not (root / "tatoeba" / f"{code}.tsv").is_file()]:
        raise ArgumentError(f"data: expected {root / 'tatoeba' / (missing[0] + '.tsv')}, which does not exist")
    pairs = {path.stem: _pairs(path) for path in files if find_language(path.stem) is not None}
    test, dev, held_out, rest = {}, [], set(), {}
    for code in settings.tested:
        order = list(pairs[code])
        random.Random(_SPLIT_SEED).shuffle(order)
        fitting = _first_of_each_english(order, settings.english_words)
        wanted = settings.test_per_language + (0 if code in settings.unseen else settings.dev_per_language)
        if len(fitting) < wanted:
            raise ArgumentError(f"data: expected {wanted} sentences of {code} for dev and test, got {len(fitting)}")
        test[code], of_dev = fitting[: settings.test_per_language], fitting[settings.test_per_language : wanted]
        dev += of_dev
        held_out |= {sentence_key(pair.target) for pair in (*test[code], *of_dev)}
        rest[code] = order
    other = _other_domain(settings, root / "ntrex")
    held_out |= {sentence_key(pair.target) for group in other.values() for pair in group}
    trained = [pair for code, group in pairs.items() if code not in settings.unseen for pair in group]
    train = [pair for pair in trained if sentence_key(pair.target) not in held_out]
    random.Random(_SPLIT_SEED).shuffle(train)
    free = {code: [pair for pair in group if sentence_key(pair.target) not in held_out] for code, group in rest.items()}
    used = [*files, *(root / "ntrex" / f"{code}.tsv" for code in other)]
    facts = {
        "files": {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in used},
        "train": {"languages": len({pair.language for pair in train}), "pairs": len(train), "of": _digest(train)},
        "dev": {"pairs": len(dev), "of": _digest(dev)},
        "test": {"pairs": sum(map(len, test.values())), "of": _digest(pair for g in test.values() for pair in g)},
        "other_domain": {
            "pairs": sum(map(len, other.values())), "of": _digest(pair for g in other.values() for pair in g),
        },
        "left_out_of_training": len(trained) - len(train),
    }  # fmt: skip
    dev.sort(key=lambda pair: len(pair.source) + len(pair.target))  # less padding
    return RealData(train, dev, test, other, {code: group[:5] for code, group in free.items()}, facts)


def _pairs(path: Path) -> list[Example]:
    return load_examples(str(path), format="pairs")[0]


def _first_of_each_english(pairs: Iterable[Example], words: Sequence[int]) -> list[Example]:
    """Pairs whose English has `words[0]` to `words[1]` words; only the first pair of each English sentence."""
    found: dict[str, Example] = {}
    for pair in pairs:
        if words[0] <= len(pair.target.split()) <= words[1]:
            found.setdefault(sentence_key(pair.target), pair)
    return list(found.values())


def _other_domain(settings: RealSettings, folder: Path) -> dict[str, list[Example]]:
    if not settings.other_domain_per_language or not folder.is_dir():
        return {}
    groups = {
        path.stem: _first_of_each_english(_pairs(path), settings.other_domain_words)
        for path in sorted(folder.glob("*.tsv"))
    }
    return {code: group[: settings.other_domain_per_language] for code, group in groups.items()}


def _digest(pairs: Iterable[Example]) -> str:
    text = "".join(f"{pair.source}\t{pair.target}\n" for pair in pairs)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def as_text(pairs: Sequence[Example], shots: Sequence[Example] = ()) -> list[Example]:
    """The pairs for an LLM without an encoder: the sentence is in the prompt, after `shots` if there are any.

    Without `shots` the prompt is the sentence and a line that asks for English.
    """
    before = "".join(f"{pair.language}: {pair.source}\nEnglish: {pair.target}\n\n" for pair in shots)
    start = f"{shots[0].language}: " if shots else ""
    return [
        Example("", pair.target, pair.language, prompt=f"{before}{start}{pair.source}\nEnglish:", id=pair.id)
        for pair in pairs
    ]


def language_name(code: str) -> str:
    """The English name of a file's language."""
    return language_of(code).name
