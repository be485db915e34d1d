"""Result files of `pytest benchmarks/ --results DIR`: reading them, and comparing two of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layalign.errors import ArgumentError, shown

FORMAT = 1
FILE = "bench.json"
NEEDED = ("id", "group", "name", "unit", "labels", "median", "q1", "q3")
_TYPES: dict[str, Any] = dict.fromkeys(("median", "q1", "q3"), int | float)
_TYPES |= {"id": str, "name": str, "unit": str, "labels": dict}


@dataclass(frozen=True)
class Results:
    """One result file.

    Attributes:
        path: where it was read.
        data: the whole file: facts, shapes, dtype, ceilings, left out, failed, rows.
        rows: the rows by their id.
    """

    path: Path
    data: dict[str, Any]
    rows: dict[str, dict[str, Any]]

    @property
    def device(self) -> str:
        """Type and name of the device, and the number of threads on a CPU."""
        found = self.data["facts"]["device"]
        threads = f", {found['threads']} threads" if "threads" in found else ""
        return f"{found['type']}: {found['name']}{threads}"

    @property
    def gpu(self) -> bool:
        """Whether it was measured on a GPU: the shapes that were run, not what else the machine has."""
        return bool(self.data["shapes"] == "gpu")

    @property
    def shapes(self) -> str:
        """The choice of shapes, and the dtype."""
        return f"{self.data['shapes']}, {self.data['dtype']}"

    @property
    def commit(self) -> str:
        """Short, marked where files were changed."""
        facts = self.data["facts"]
        return str(facts.get("commit", "unknown"))[:12] + (" (with changes)" if facts.get("changed files") else "")


def load(path: Path) -> Results:
    """Read a result file, or the ``bench.json`` of a folder.

    Raises:
        ArgumentError: there is none, or it is not a result file of this version.
    """
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise ArgumentError(f"results: no such file: {file}")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"results: {file} is not JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(data, dict) or not isinstance(data.get("rows"), list):
        raise ArgumentError(f"results: {file} has no rows; expected what `pytest benchmarks/ --results DIR` writes")
    if data.get("format") != FORMAT:
        raise ArgumentError(f"results: {file} has format {data.get('format')!r}, this version reads {FORMAT}")
    for key in ("facts", "shapes", "dtype"):
        if key not in data:
            raise ArgumentError(f"results: {file} lacks {key!r}")
    device = data["facts"].get("device") if isinstance(data["facts"], dict) else None
    if not isinstance(device, dict) or not {"type", "name"} <= device.keys():
        raise ArgumentError(f"results: {file} does not say the device, expected facts with its type and name")
    rows: dict[str, dict[str, Any]] = {}
    for index, row in enumerate(data["rows"]):
        if not isinstance(row, dict):
            raise ArgumentError(f"results: {file}, row {index}: expected an object, got {shown(row)}")
        missing = [key for key in NEEDED if key not in row]
        if missing:
            raise ArgumentError(f"results: {file}, row {index} lacks {', '.join(missing)}")
        wrong = [key for key, kind in _TYPES.items() if isinstance(row[key], bool) or not isinstance(row[key], kind)]
        if wrong:
            raise ArgumentError(f"results: {file}, row {index}: {wrong[0]} is {shown(row[wrong[0]])}")
        if row["id"] in rows:
            raise ArgumentError(f"results: {file} has two rows {row['id']!r}")
        rows[row["id"]] = row
    return Results(file, data, rows)


def load_folder(folder: Path) -> list[Results]:
    """Every result file of a folder (other JSON files are passed over), by name.

    Raises:
        ArgumentError: there is none.
    """
    if not folder.is_dir():
        raise ArgumentError(f"results: no such folder: {folder}")
    found = []
    for file in sorted(folder.glob("*.json")):
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            data = None
        if isinstance(data, dict) and "rows" in data and "format" in data:
            found.append(load(file))
    if not found:
        raise ArgumentError(f"results: {folder} has no result file; `pytest benchmarks/ --results {folder}` writes one")
    return found


@dataclass(frozen=True)
class Change:
    """One row in both files. ``ratio`` is second / first: above one is slower, or more memory."""

    id: str
    unit: str
    first: float
    second: float
    ratio: float
    regression: bool
    improvement: bool


def compare(first: Results, second: Results, threshold: float = 1.1) -> list[Change]:
    """The rows that both files have, in the order of the first.

    A regression is a median more than ``threshold`` times the other, with quartile ranges that do not touch (the first
    quartile of the worse above the third of the better); an improvement is the same the other way round.

    Raises:
        ArgumentError: the files are of different devices or shapes, or have no row in common.
    """
    if threshold < 1:
        raise ArgumentError(f"threshold: expected a factor of at least 1, got {threshold}")
    for what, one, two in (("devices", first.device, second.device), ("shapes", first.shapes, second.shapes)):
        if one != two:
            raise ArgumentError(f"compare: different {what}: {one!r} and {two!r}")
    changes = []
    for name, row in first.rows.items():
        if name not in second.rows:
            continue
        other = second.rows[name]
        for key in row["labels"].keys() & other["labels"].keys() - {"auto", "form"}:
            if row["labels"][key] != other["labels"][key]:
                values = f"{row['labels'][key]!r} and {other['labels'][key]!r}"
                raise ArgumentError(f"compare: different shapes in {name!r}: {key} is {values}")
        changes.append(_change(name, row, other, threshold))
    if not changes:
        raise ArgumentError(f"compare: {first.path} and {second.path} have no row in common")
    return changes


def _change(name: str, row: dict[str, Any], other: dict[str, Any], threshold: float) -> Change:
    one, two = row["median"], other["median"]
    ratio = two / one if one > 0 else (1.0 if two <= 0 else float("inf"))
    worse = ratio > threshold and other["q1"] > row["q3"]
    better = ratio < 1 / threshold and other["q3"] < row["q1"]
    return Change(name, row["unit"], one, two, ratio, worse, better)


def quantity(value: float, unit: str) -> str:
    """1.23 ms, 45.6 MiB."""
    if unit == "bytes":
        return f"{value / 2**20:.2f} MiB"
    for factor, name in ((1, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= factor:
            return f"{value / factor:.3g} {name}"
    return f"{value * 1e9:.3g} ns"
