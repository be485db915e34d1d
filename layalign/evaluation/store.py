"""The outputs of an evaluation on the disk, from which a rerun goes on where the last one stopped."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from layalign.data.examples import Example
from layalign.utils.errors import ArgumentError, DataError
from layalign.utils.files import write_whole, writing
from layalign.utils.limits import MAX_LINE_BYTES, MAX_WHOLE_BYTES
from layalign.utils.reading import read_bytes, read_json

logger = logging.getLogger("layalign")

SETTINGS = "settings.json"
LATER = ("tokenizers", "model_settings")  # not in the settings that an earlier layalign wrote
CUT = ("source", "prompt", "context", "answer")
LONGEST_NAME = 160  # bytes; file systems take 255


def fingerprint(examples: Sequence[Example]) -> str:
    """A short hash of everything that decides what is generated for the examples and what counts as right."""
    digest = hashlib.sha256()
    for example in examples:
        parts = (example.source, example.target, example.language, example.prompt, *example.choices)
        digest.update(json.dumps(parts).encode("utf-8"))
    return digest.hexdigest()[:16]


def prediction_path(folder: Path, language: str, suffix: str) -> Path:
    """File of a language in a run's folder.

    Characters that a file name cannot hold become "_"; a hash then keeps apart what would be one name.
    """
    name = re.sub(r"[^\w() '.-]", "_", language)
    if name != language or len(name.encode()) > LONGEST_NAME:
        whole = language.encode("utf-8", errors="surrogatepass")
        name = f"{name.encode()[:LONGEST_NAME].decode(errors='ignore')}-{hashlib.sha256(whole).hexdigest()[:8]}"
    return folder / "predictions" / (name + suffix)


def read_settings(folder: Path) -> dict[str, dict[str, Any]]:
    """What `settings.json` holds: the settings, by language its questions' fingerprint, and how it was scored.

    Raises:
        DataError: it is damaged.
    """
    try:
        found = read_json(folder / SETTINGS, error=DataError)
    except DataError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(found.get(key), dict) for key in ("settings", "languages")):
        raise DataError(
            f"{folder / SETTINGS}:1: not the settings of an evaluation, expected a file that layalign wrote"
        )
    scoring = found.get("scoring")  # not in what an earlier layalign wrote
    return {**found, "scoring": scoring if isinstance(scoring, dict) else {}}


class OutputStore:
    """What a run got from its model: `predictions/<language>.jsonl`, one line per text, appended batch by batch.

    Lists of numbers, which likelihoods give, have lines of their own: the example's number, what was measured, and the
    numbers.

    Args:
        folder: the output folder; made if it does not exist.
        settings: what decides the outputs, as JSON values. `settings.json` keeps them.
        resume: go on with the outputs that are there; otherwise they are deleted first.

    Attributes:
        cut: by language and number of the example, what of it was cut (only where something was).
        values: by language, by what was measured, and by number of the example: lists of numbers.

    Raises:
        ArgumentError: outputs of other settings are there and `resume` is asked for.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], resume: bool) -> None:
        self.folder = folder
        self.cut: dict[str, dict[int, list[str]]] = {}
        self.values: dict[str, dict[str, dict[int, list[float]]]] = {}
        with writing(f"output_dir: {folder}"):
            (folder / "predictions").mkdir(parents=True, exist_ok=True)
        fresh: dict[str, dict[str, Any]] = {"settings": dict(settings), "languages": {}, "scoring": {}}
        old = read_settings(folder) if (folder / SETTINGS).exists() else fresh
        if not resume:
            for language in old["languages"]:
                for suffix in (".jsonl", ".json"):
                    prediction_path(folder, language, suffix).unlink(missing_ok=True)
            old = fresh
        self._check(old["settings"], settings)
        self._settings = {**fresh, "languages": old["languages"], "scoring": old["scoring"]}
        self._save()

    def _save(self) -> None:
        write_whole(self.folder / SETTINGS, json.dumps(self._settings, indent=2, ensure_ascii=False) + "\n")

    def _check(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        # Through JSON, so that tuples and lists are equal.
        new = json.loads(json.dumps(new))
        for key in (*new, *old):
            if key in LATER and key not in old:
                logger.warning("%s: could not be compared with this evaluation: %s", self.folder, key)
            elif old.get(key) != new.get(key):
                raise ArgumentError(
                    f"output_dir: {self.folder} holds outputs made with {key} {_short(old.get(key))}, not "
                    f"{_short(new.get(key))}; expected another folder, or resume=False to start again"
                )

    def begin(self, language: str, examples: Sequence[Example]) -> dict[int, str | None]:
        """The outputs that are there already, by the number of their example; None for one that failed.

        A last line that was only half written is cut off.

        Raises:
            ArgumentError: they belong to other examples.
            DataError: a line before the last is damaged.
        """
        known = self._settings["languages"]
        mark = {"examples": fingerprint(examples), "count": len(examples)}
        if language in known and known[language] != mark:
            raise ArgumentError(
                f"output_dir: {self.folder} holds outputs for other {language} examples than these {len(examples)}; "
                "expected another folder, or resume=False to start again"
            )
        path = prediction_path(self.folder, language, ".jsonl")
        if language not in known:
            path.unlink(missing_ok=True)
            known[language] = mark
            self._save()
        self.cut[language], self.values[language] = {}, {}
        return self._read(path, len(examples), language) if path.exists() else {}

    def scored(self, language: str, scoring: Mapping[str, str]) -> None:
        """Keep how the predictions of a language were judged: a rerun may judge some languages otherwise."""
        if self._settings["scoring"].get(language) != scoring:
            self._settings["scoring"][language] = dict(scoring)
            self._save()

    def count_cut(self) -> dict[str, int]:
        """How many examples had each of their texts cut."""
        found = Counter(kind for of in self.cut.values() for kinds in of.values() for kind in kinds)
        return {kind: found[kind] for kind in CUT}

    def _read(self, path: Path, count: int, language: str) -> dict[int, str | None]:
        raw = read_bytes(path, most=MAX_WHOLE_BYTES, error=DataError)
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) != len(raw):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        outputs: dict[int, str | None] = {}
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            try:
                entry = json.loads(line[: MAX_LINE_BYTES + 1])
                index, measure = entry["index"], entry.get("measure")
                good = isinstance(index, int) and 0 <= index < count
                if measure is not None:
                    values = entry["values"]
                    good = good and isinstance(measure, str) and isinstance(values, list)
                    good = good and all(type(value) in (int, float) and isfinite(value) for value in values)
                else:
                    output, kinds = entry["output"], entry.get("cut", [])
                    good = (
                        good and isinstance(output, str | None) and isinstance(kinds, list) and set(kinds) <= set(CUT)
                    )
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
                good = False
            if not good:
                raise DataError(f"{path}:{number}: a damaged line, expected the index and output of one example")
            if measure is not None:
                self.values[language].setdefault(measure, {})[index] = values
            else:
                outputs[index] = output
                self.cut[language].update({index: kinds} if kinds else {})
        return outputs

    def append(self, language: str, outputs: Mapping[int, str | None], cut: Mapping[int, Sequence[str]]) -> None:
        """Add a batch of outputs, with what was cut of each; on return they are on the disk.

        Raises:
            OutputError: they cannot be written; a rerun goes on after those that were.
        """
        found = {i: list(kinds) for i, kinds in cut.items() if kinds}
        self.cut[language].update(found)
        entries = [
            {"index": i, "output": text, **({"cut": found[i]} if i in found else {})} for i, text in outputs.items()
        ]
        self._write(language, entries)

    def append_values(self, language: str, measure: str, values: Mapping[int, Sequence[float]]) -> None:
        """Add numbers that were measured for a batch, as `append` adds its outputs."""
        self.values[language].setdefault(measure, {}).update({i: list(row) for i, row in values.items()})
        self._write(language, [{"index": i, "measure": measure, "values": list(row)} for i, row in values.items()])

    def _write(self, language: str, entries: Sequence[Mapping[str, Any]]) -> None:
        lines = [json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n" for entry in entries]
        path = prediction_path(self.folder, language, ".jsonl")
        kept = "the answers written before are kept, and a rerun goes on after them"
        with writing(f"output_dir: {path}", kept), path.open("ab") as file:
            file.write("".join(lines).encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())


def _short(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
