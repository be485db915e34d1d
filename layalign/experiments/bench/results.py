"""Result files of `pytest benchmarks/ --results DIR`: reading them, and comparing two of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layalign.utils.errors import ArgumentError, shown
from layalign.utils.reading import read_json

FORMAT = 1
FILE = "bench.json"
RATES = ("GB/s", "TFLOP/s", "percent of ceiling")
NEEDED = ("id", "group", "name", "unit", "labels", "median", "q1", "q3")
UNITS = ("s", "bytes")
OPTIONAL = ("ratio q1", "ratio q3", "ratio low", "ratio high", "rounds")  # of each baseline
FEW_ROUNDS = 3  # with fewer, a ratio counts as rough
_VARIES = {"auto", "form", "zeros of the relu"}  # labels that record an outcome, not a setting


@dataclass(frozen=True)
class Results:
    """One result file.

    Attributes:
        path: the file.
        data: its content: facts, shapes, dtype, ceilings, left out, failed, rows.
        rows: the rows by id.
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
        """Whether it was measured on a GPU, judged by the shapes: a machine with a GPU may measure on its CPU."""
        return bool(self.data["shapes"] == "gpu")

    @property
    def shapes(self) -> str:
        """The choice of shapes, and the dtype."""
        return f"{self.data['shapes']}, {self.data['dtype']}"

    @property
    def commit(self) -> str:
        """The short commit, with a mark if there were uncommitted changes."""
        facts = self.data["facts"]
        return str(facts.get("commit", "unknown"))[:12] + (" (with changes)" if facts.get("changed files") else "")


def load(path: Path) -> Results:
    """Read a result file, or the ``bench.json`` of a folder.

    Raises:
        ArgumentError: there is none, or it is not a result file of this version.
    """
    file = path / FILE if path.is_dir() else path
    _need(file.is_file(), f"no such file: {file}")
    data = read_json(file, where=f"results: {file}", error=ArgumentError)
    rows_there = isinstance(data, dict) and isinstance(data.get("rows"), list)
    _need(rows_there, f"{file} has no rows; expected what `pytest benchmarks/ --results DIR` writes")
    _need(data.get("format") == FORMAT, f"{file} has format {data.get('format')!r}, this version reads {FORMAT}")
    for key in ("facts", "shapes", "dtype"):
        _need(key in data, f"{file} lacks {key!r}")
    facts = data["facts"]
    device = facts.get("device") if isinstance(facts, dict) else None
    named = isinstance(device, dict) and {"type", "name"} <= device.keys()
    _need(named, f"{file} names no device, expected facts with its type and name")
    ceilings = data.get("ceilings", {})
    above = isinstance(ceilings, dict) and all(_is_number(value) and value > 0 for value in ceilings.values())
    _need(above, f"{file}: ceilings: expected numbers above 0, got {shown(ceilings)}")
    for name, value in (("facts.versions", facts.get("versions", {})), ("left out", data.get("left out", {}))):
        _need(isinstance(value, dict), f"{file}: {name}: expected an object, got {shown(value)}")
    failed = data.get("failed", [])
    _need(isinstance(failed, list), f"{file}: failed: expected a list, got {shown(failed)}")
    rows: dict[str, dict[str, Any]] = {}
    for index, row in enumerate(data["rows"]):
        where = f"{file}, row {index}"
        _check_row(where, row)
        _need(row["id"] not in rows, f"{where}: there are two rows {row['id']!r}")
        rows[row["id"]] = row
    return Results(file, data, rows)


def _need(holds: bool, text: str) -> None:
    if not holds:
        raise ArgumentError(f"results: {text}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_row(where: str, row: Any) -> None:
    _need(isinstance(row, dict), f"{where}: expected an object, got {shown(row)}")
    missing = [key for key in NEEDED if key not in row]
    _need(not missing, f"{where}: lacks {', '.join(missing)}")
    texts = all(isinstance(row[key], str) for key in ("id", "group", "name"))
    labelled = texts and row["unit"] in UNITS and isinstance(row["labels"], dict)
    _need(labelled, f"{where}: expected text as id, group and name, s or bytes as unit, an object as labels")
    spread = [row[key] for key in ("q1", "median", "q3")]
    ordered = all(map(_is_number, spread)) and [0, *spread] == sorted([0, *spread])
    _need(ordered, f"{where}: expected finite numbers 0 <= q1 <= median <= q3, got {', '.join(map(shown, spread))}")
    against, target = row.get("against", {}), row.get("target")
    objects = isinstance(against, dict) and all(isinstance(found, dict) for found in against.values())
    _need(objects, f"{where}: against: expected an object of objects, got {shown(against)}")
    ratios = [found.get("ratio") for found in against.values()]
    optional = [found[key] for found in against.values() for key in OPTIONAL if key in found]
    finite = all(map(_is_number, (*ratios, *optional)))
    _need(finite, f"{where}: against: expected a finite ratio for each baseline, got {shown(against)}")
    aimed = target is None or (isinstance(target, dict) and isinstance(target.get("baseline"), str))
    _need(aimed, f"{where}: target: expected an object with its baseline, got {shown(target)}")
    limits = () if target is None else (target.get("must"), target.get("aim", 0) or 0)
    numbers = [row[key] for key in (*RATES, "flop per byte", "clock MHz") if row.get(key) is not None]
    finite = all(map(_is_number, (*limits, *numbers)))
    _need(finite, f"{where}: expected finite numbers as target, rates and clock, got {shown([*limits, *numbers])}")
    if "slopes" in row:
        _check_slopes(where, row["slopes"], row.get("points"), row["labels"].get("sizes"))


def _check_slopes(where: str, slopes: Any, points: Any, sizes: Any) -> None:
    """Check the extra fields of a scaling row."""
    there = isinstance(slopes, dict) and isinstance(points, dict) and isinstance(sizes, list)
    _need(there, f"{where}: expected slopes and points by name, and labels.sizes")
    for who, own in slopes.items():
        series = points.get(who)
        whole = isinstance(own, dict) and own.keys() == set(UNITS) and all(map(_is_number, own.values()))
        whole = whole and isinstance(series, dict) and series.keys() == set(UNITS)
        _need(whole, f"{where}: slopes: expected numbers for {' and '.join(UNITS)} with their points, got {shown(own)}")
        for values in series.values():
            fits = isinstance(values, list) and len(values) == len(sizes) and all(map(_is_number, values))
            _need(fits, f"{where}: points: expected {len(sizes)} numbers, got {shown(values)}")


def load_folder(folder: Path) -> list[Results]:
    """Read every result file of a folder, in order of their names. Other JSON files are ignored.

    Raises:
        ArgumentError: there is none, or one of them cannot be read.
    """
    if not folder.is_dir():
        raise ArgumentError(f"results: no such folder: {folder}")
    found = []
    for file in sorted(folder.glob("*.json")):
        data = read_json(file, where=f"results: {file}", error=ArgumentError)
        if isinstance(data, dict) and "rows" in data and "format" in data:
            found.append(load(file))
    if not found:
        raise ArgumentError(f"results: {folder} has no result file; `pytest benchmarks/ --results {folder}` writes one")
    return found


@dataclass(frozen=True)
class Change:
    """A row that both files have.

    Attributes:
        first, second: the medians.
        by: the baseline whose ratios are compared, or None if the medians themselves are.
        ratio: second / first of what is compared; above 1 is slower or uses more memory.
    """

    id: str
    unit: str
    first: float
    second: float
    by: str | None
    ratio: float
    regression: bool
    improvement: bool


def compare(first: Results, second: Results, threshold: float = 1.1) -> list[Change]:
    """Compare the rows that both files have, in the order of the first.

    Times are compared by their ratio to a baseline that was measured in turns with them, since the speed of a machine
    varies. It is the baseline of the target, or else the one with the most rounds, at least three in both files.
    Without such a baseline, and for memory, the medians themselves are compared.

    A regression is a ratio above ``threshold`` with disjoint quartile ranges: the first quartile of the worse result is
    above the third of the better one. An improvement is the reverse.

    Args:
        first, second: the result files.
        threshold: factor of at least 1.

    Raises:
        ArgumentError: the files are from different devices or shapes, or have no row in common.
    """
    if not math.isfinite(threshold) or threshold < 1:
        raise ArgumentError(f"threshold: expected a factor of at least 1, got {threshold}")
    for what, one, two in (("devices", first.device, second.device), ("shapes", first.shapes, second.shapes)):
        if one != two:
            raise ArgumentError(f"compare: different {what}: {one!r} and {two!r}")
    changes = []
    for name, row in first.rows.items():
        if name not in second.rows:
            continue
        other = second.rows[name]
        pairs = {"unit": (row["unit"], other["unit"])}
        for key in row["labels"].keys() & other["labels"].keys() - _VARIES:
            pairs[key] = row["labels"][key], other["labels"][key]
        for key, (one, two) in pairs.items():
            if one != two:
                raise ArgumentError(f"compare: different shapes in {name!r}: {key} is {one!r} and {two!r}")
        changes.append(_change(name, row, other, threshold))
    if not changes:
        raise ArgumentError(f"compare: {first.path} and {second.path} have no row in common")
    return changes


def _judge(row: dict[str, Any], other: dict[str, Any]) -> str | None:
    """The baseline whose ratios are compared, or None (see :func:`compare`)."""
    rounds = {
        name: min(found.get("rounds", 0), other.get("against", {}).get(name, {}).get("rounds", 0))
        for name, found in row.get("against", {}).items()
    }
    usable = {name: count for name, count in rounds.items() if count >= FEW_ROUNDS}
    wanted = (row.get("target") or {}).get("baseline")
    if row["unit"] != "s" or not usable:
        return None
    return wanted if wanted in usable else max(usable, key=lambda name: usable[name])


def _spread(row: dict[str, Any], by: str | None) -> tuple[float, float, float]:
    """First quartile, median and third quartile of what is compared in a row."""
    if by is None:
        return row["q1"], row["median"], row["q3"]
    found = row["against"][by]
    return found.get("ratio q1", found["ratio"]), found["ratio"], found.get("ratio q3", found["ratio"])


def _change(name: str, row: dict[str, Any], other: dict[str, Any], threshold: float) -> Change:
    by = _judge(row, other)
    (low, one, high), (other_low, two, other_high) = _spread(row, by), _spread(other, by)
    ratio = two / one if one > 0 else (1.0 if two <= 0 else float("inf"))
    worse = ratio > threshold and other_low > high
    better = ratio < 1 / threshold and other_high < low
    return Change(name, row["unit"], row["median"], other["median"], by, ratio, worse, better)


def rough(found: dict[str, Any]) -> str:
    """The mark "≈" for a ratio of fewer than three rounds, else "". Memory has no rounds."""
    return "≈" if found.get("rounds", FEW_ROUNDS) < FEW_ROUNDS else ""


def ratio_text(found: dict[str, Any]) -> str:
    """The ratio to one baseline."""
    return f"{rough(found)}{found['ratio']:.3f}"


def interval_text(found: dict[str, Any]) -> str:
    """The 95 % interval of the ratio to one baseline; empty if there were too few rounds."""
    ends = [f"{found[key]:.3f}" for key in ("ratio low", "ratio high") if key in found]
    return " to ".join(ends) if len(ends) == 2 else ""


def quantity(value: float, unit: str) -> str:
    """A value with its unit, such as "1.23 ms" or "45.60 MiB"."""
    if unit == "bytes":
        return f"{value / 2**20:.2f} MiB"
    for factor, name in ((1, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= factor:
            return f"{value / factor:.3g} {name}"
    return f"{value * 1e9:.3g} ns"
