"""Lines of text and records of JSON from files, each with the number of its line.

Lines end at "\\n" only: Python's `str.splitlines` would also cut at characters such as U+2028, which are text here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from layalign.data.examples import BadRecord
from layalign.errors import DataError

_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_number)


def _what(error: ValueError | RecursionError) -> str:
    """Why a text is no JSON. Besides bad syntax: NaN, a number of more digits than Python reads, deep nesting."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "nested too deep" if isinstance(error, RecursionError) else str(error).split(" for ")[0].split(";")[0]


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, bytes without the line end) of a file; a byte-order mark at its start is left out."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if number == 1 and raw.startswith(_BOM):
                raw = raw[len(_BOM) :]
            yield number, raw.rstrip(b"\r\n")


def decode(raw: bytes) -> str:
    """A line as text; bytes that are not UTF-8 raise BadRecord."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(f"byte 0x{raw[error.start]:02x} at position {error.start + 1}, expected UTF-8") from None


def parse_json(line: str) -> Any:
    """The value on a line of JSON lines; BadRecord when it is none."""
    try:
        return _DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        where = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise BadRecord(f"bad JSON ({_what(error)}{where}), expected an object") from None


def split_columns(line: str, names: tuple[str, ...]) -> dict[str, str]:
    """The columns of a line of TSV by name; another number of columns raises BadRecord."""
    values = line.split("\t")
    if len(values) != len(names):
        raise BadRecord(f"{len(values)} columns, expected {len(names)} ({'<TAB>'.join(names)})")
    return dict(zip(names, values, strict=True))


def parallel_lines(first: Path, second: Path) -> Iterator[tuple[int, bytes, bytes]]:
    """(line number, line, line) of two files that belong together line by line.

    Raises:
        DataError: one file is longer; nothing says then which lines belong together.
    """
    for number, (one, other) in enumerate(zip_longest(raw_lines(first), raw_lines(second)), 1):
        if one is None or other is None:
            short, long = (first, second) if one is None else (second, first)
            raise DataError(f"{short}:{number}: no such line, expected as many lines as in {long}")
        yield number, one[1], other[1]


def is_json_lines(path: Path) -> bool:
    """Whether a file holds one JSON value per line (MSVAMP is published as such under the name .json)."""
    if path.suffix != ".json":
        return True
    with path.open("rb") as file:
        if file.read(64).removeprefix(_BOM).lstrip().startswith(b"["):
            return False  # a gigabyte in one line, perhaps
        file.seek(0)
        first = file.readline().removeprefix(_BOM).strip()
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and "data" not in value


class JsonRecords:
    """The records of a JSON file: those of its array, or of the array under "data" of its object.

    Raises:
        DataError: the file is not UTF-8, not JSON, has no such array, or more behind it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._counted = 0, 1  # a position and its line: counting goes on from there, not from the start
        raw = path.read_bytes().removeprefix(_BOM)
        try:
            self.text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            raise DataError(f"{path}:{line}: byte 0x{raw[error.start]:02x}, expected UTF-8") from None

    def line_of(self, position: int) -> int:
        """Number of the line that a character stands in."""
        start, line = self._counted if self._counted[0] <= position else (0, 1)
        line += self.text.count("\n", start, position)
        self._counted = position, line
        return line

    def _skip(self, position: int, expected: str) -> tuple[int, str]:
        """Past white space and one of the `expected` characters: (position, that character)."""
        position = _SPACE.match(self.text, position).end()  # type: ignore[union-attr]
        found = self.text[position : position + 1]
        if not found or found not in expected:
            what = repr(found) if found else "the end of the file"
            raise DataError(f"{self.path}:{self.line_of(position)}: {what}, expected {' or '.join(expected)}")
        return position + 1, found

    def _value(self, position: int) -> tuple[int, Any, int]:
        """A value: (where it starts, the value, where it ends)."""
        start = _SPACE.match(self.text, position).end()  # type: ignore[union-attr]
        try:
            value, end = _DECODER.raw_decode(self.text, start)
        except (ValueError, RecursionError) as error:
            line = error.lineno if isinstance(error, json.JSONDecodeError) else self.line_of(start)
            raise DataError(f"{self.path}:{line}: bad JSON ({_what(error)}), expected a value") from None
        return start, value, end

    def _array(self) -> tuple[int, bool]:
        """Position after the "[" that opens the records, and whether that is all there is."""
        position, opening = self._skip(0, "[{")
        if opening == "[":
            return position, True
        while True:
            _, key, position = self._value(position)
            position, _ = self._skip(position, ":")
            if key == "data":
                return self._skip(position, "[")[0], False
            _, _, position = self._value(position)
            position, closing = self._skip(position, ",}")
            if closing == "}":
                raise DataError(f"{self.path}:1: an object without 'data', expected an array of records")

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """(position, record) of each record; `line_of` gives the line."""
        position, alone = self._array()
        empty = self.text.startswith("]", _SPACE.match(self.text, position).end())  # type: ignore[union-attr]
        position, closing = self._skip(position, "]") if empty else (position, ",")
        while closing == ",":
            start, value, position = self._value(position)
            yield start, value
            position, closing = self._skip(position, ",]")
        end = _SPACE.match(self.text, position).end()  # type: ignore[union-attr]
        if alone and end < len(self.text):
            raise DataError(f"{self.path}:{self.line_of(end)}: {self.text[end]!r}, expected the end of the file")
