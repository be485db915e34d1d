"""Lines of text, rows of tables and records of JSON from files, each with the number of its line.

Lines end at "\\n" only: Python's `str.splitlines` would also cut at characters such as U+2028, which are text here.
Files compressed by gzip, bzip2 or xz are read as what is in them, whatever their name.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

from layalign.data.examples import BadRecord
from layalign.utils.errors import BackendError, DataError, first_line
from layalign.utils.limits import MAX_LINE_BYTES, MAX_ROWS, MAX_ROWS_BYTES, MAX_WHOLE_BYTES

COMPRESSED = (".gz", ".bz2", ".xz")
_OPEN: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh91AY&SY": bz2.open, b"\xfd7zXZ\0": lzma.open}
_REFUSED = {
    b"PK\x03\x04": "a zip file (or a spreadsheet)",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"ARROW1": "an Arrow file",
    b"PAR1": "a Parquet file, for which the name has to end in .parquet",
    b"\xff\xfe": "UTF-16, by its byte-order mark",
    b"\xfe\xff": "UTF-16, by its byte-order mark",
}
_BOM = b"\xef\xbb\xbf"
_ALL_QUOTED = re.compile(rb'"(?:[^"]|"")*"(?:\t"(?:[^"]|"")*")*')
_SPACE = re.compile(r"[ \t\r\n]*")


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_number)


def _what(error: ValueError | RecursionError) -> str:
    """Why a text is no JSON: bad syntax, NaN, more digits than Python reads, or deep nesting."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "nested too deep" if isinstance(error, RecursionError) else str(error).split(" for ")[0].split(";")[0]


def plain_name(path: Path) -> Path:
    """The name that a compressed file has when it is not compressed."""
    return path.with_suffix("") if path.suffix.lower() in COMPRESSED else path


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The file, decompressed.

    Raises:
        DataError: it is no text, and of a kind that is not read; or its compressed data are damaged.
    """
    with path.open("rb") as file:
        head = file.read(16)
    for start, what in _REFUSED.items():
        if head.startswith(start):
            raise DataError(f"{path}:1: {what}, expected text in UTF-8, plain or compressed by gzip, bzip2 or xz")
    opener = next((opener for start, opener in _OPEN.items() if head.startswith(start)), open)
    try:
        with opener(path, "rb") as file:
            yield file
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and (opener is open or error.errno is not None):
            raise
        raise DataError(f"{path}: damaged, expected a whole compressed file ({first_line(error)})") from error


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, bytes without the line end) of a file; a byte-order mark at its start is left out.

    A line of more than `MAX_LINE_BYTES` is cut, but stays long enough for :func:`decode` to refuse it.

    Raises:
        DataError: the lines end in a carriage return alone.
    """
    with opened(path) as file:
        for number, raw in enumerate(iter(partial(file.readline, MAX_LINE_BYTES + 2), b""), 1):
            if too_long := len(raw) > MAX_LINE_BYTES + 1 and not raw.endswith(b"\n"):
                _skip_line(file)
            if number == 1:
                raw = raw.removeprefix(_BOM)
                if not raw.endswith(b"\n") and b"\r" in raw.rstrip(b"\r"):
                    raise DataError(f"{path}:1: lines that end in a carriage return alone, expected a line feed")
            yield number, raw if too_long else raw.rstrip(b"\r\n")


def _skip_line(file: IO[bytes]) -> None:
    """Past the end of the line."""
    while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
        pass


def decode(raw: bytes) -> str:
    """A line as text; bytes that are not UTF-8, a null byte and too many bytes raise BadRecord."""
    if len(raw) > MAX_LINE_BYTES:
        raise BadRecord(f"a line of more than {MAX_LINE_BYTES} bytes, expected one record")
    if 0 in raw:
        raise BadRecord(f"a null character at position {raw.index(0) + 1}, expected text in UTF-8")
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


def by_name(values: list[str], names: tuple[str, ...], separator: str = "<TAB>") -> dict[str, str]:
    """The columns of a row by name; another number of columns raises BadRecord."""
    if len(values) != len(names):
        raise BadRecord(f"{len(values)} columns, expected {len(names)} ({separator.join(names)})")
    return dict(zip(names, values, strict=True))


def unquoted(field: str, always: bool = True) -> str:
    """The text of a field of TSV that a CSV writer has put into quotes; any other field as it is.

    Such a field starts and ends with a quote, and the quotes in it are doubled. Text may look like that too ("Yes"
    between quotes). So without `always` a field counts only if it has doubled quotes in it.
    """
    if len(field) < 2 or field[0] != '"' or field[-1] != '"':
        return field
    inner = field[1:-1]
    if '"' in inner.replace('""', "") or not (always or '""' in inner):
        return field
    return inner.replace('""', '"')


def all_quoted(path: Path) -> bool:
    """Whether every field of every line of a TSV file stands in quotes: then a writer put them there."""
    return all(_ALL_QUOTED.fullmatch(raw) for _, raw in raw_lines(path))


def split_quoted(line: str, count: int, always: bool) -> list[str]:
    """The columns of a line of TSV that may have fields in quotes; a line of another number of columns as it is.

    A tab within quotes ends no field where the line has the expected number of columns only so. Lines are never joined.
    """
    values = line.split("\t")
    if '"' not in line:
        return values
    if len(values) > count:
        try:
            inside = next(csv.reader([line], delimiter="\t", strict=True))
        except csv.Error:
            inside = values
        return inside if len(inside) == count else values
    if len(values) < count and values[-1].startswith('"') and unquoted(values[-1]) == values[-1]:
        what = "a quoted field that does not end on its line"
        raise BadRecord(f"{len(values)} columns and {what}, expected {count} (records of several lines only in .csv)")
    return [unquoted(value, always) for value in values]


def csv_rows(path: Path) -> Iterator[tuple[int, list[str] | BadRecord]]:
    """(number of its first line, fields or what is wrong) of each record of a CSV file.

    Raises:
        DataError: a quoted field does not end, so that it is unknown where the next record starts.
    """

    def lines() -> Iterator[str]:
        for number, raw in raw_lines(path):
            try:
                yield decode(raw) + "\n"
            except BadRecord as error:
                raise DataError(f"{path}:{number}: {error}") from None

    reader = csv.reader(lines(), strict=True)
    while True:
        start = reader.line_num + 1
        try:
            yield start, next(reader) or BadRecord("an empty line, expected a record")
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise DataError(f"{path}:{start}: a quoted field that does not end, expected a closing quote") from None
            yield start, BadRecord(f"bad CSV ({error}), expected fields between commas")


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a Parquet file.

    Raises:
        DataError: it is none.
        BackendError: pyarrow, which comes with `datasets`, is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise BackendError(f"datasets: {path} needs the 'datasets' package ({error})") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(MAX_ROWS):
                if batch.nbytes > MAX_ROWS_BYTES:
                    raise DataError(f"{path}: {len(batch)} rows of {batch.nbytes} bytes, expected {MAX_ROWS_BYTES}")
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: expected a Parquet file ({first_line(error)})") from error


def parallel_lines(first: Path, second: Path) -> Iterator[tuple[int, bytes, bytes]]:
    """(line number, line, line) of two files that belong together line by line.

    Raises:
        DataError: one file is longer, so that it is unknown which lines belong together.
    """
    for number, (one, other) in enumerate(zip_longest(raw_lines(first), raw_lines(second)), 1):
        if one is None or other is None:
            short, long = (first, second) if one is None else (second, first)
            raise DataError(f"{short}:{number}: no such line, expected as many lines as in {long}")
        yield number, one[1], other[1]


def is_json_lines(path: Path) -> bool:
    """Whether a file holds one JSON value per line (MSVAMP is published as such under the name .json)."""
    if plain_name(path).suffix.lower() != ".json":
        return True
    with opened(path) as file:
        if file.read(64).removeprefix(_BOM).lstrip().startswith(b"["):
            return False  # a gigabyte in one line, perhaps
        file.seek(0)
        first = file.readline(MAX_LINE_BYTES + 1).removeprefix(_BOM).strip()
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and "data" not in value


class JsonRecords:
    """The records of a JSON file: those of its array, or of the array under "data" of its object.

    Raises:
        DataError: the file is not UTF-8, not JSON, has no such array, or more after it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._counted = 0, 1  # a position and its line: counting goes on from there, not from the start
        with opened(path) as file:
            raw = file.read(MAX_WHOLE_BYTES + 1).removeprefix(_BOM)
        if len(raw) > MAX_WHOLE_BYTES:
            raise DataError(
                f"{path}: more than {MAX_WHOLE_BYTES} bytes, expected JSON lines (.jsonl) for so many records"
            )
        try:
            self.text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            raise DataError(f"{path}:{line}: byte 0x{raw[error.start]:02x}, expected UTF-8") from None

    def _line_of(self, position: int) -> int:
        """Number of the line that a character stands in, which comes after all characters asked about before."""
        start, line = self._counted
        line += self.text.count("\n", start, position)
        self._counted = position, line
        return line

    def _skip(self, position: int, expected: str) -> tuple[int, str]:
        """Past white space and one of the `expected` characters: (position, that character)."""
        position = _SPACE.match(self.text, position).end()  # type: ignore[union-attr]
        found = self.text[position : position + 1]
        if not found or found not in expected:
            what = repr(found) if found else "the end of the file"
            raise DataError(f"{self.path}:{self._line_of(position)}: {what}, expected {' or '.join(expected)}")
        return position + 1, found

    def _value(self, position: int) -> tuple[int, Any, int]:
        """A value: (where it starts, the value, where it ends)."""
        start = _SPACE.match(self.text, position).end()  # type: ignore[union-attr]
        try:
            value, end = _DECODER.raw_decode(self.text, start)
        except (ValueError, RecursionError) as error:
            line = error.lineno if isinstance(error, json.JSONDecodeError) else self._line_of(start)
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
        """(number of its first line, record) of each record."""
        position, alone = self._array()
        empty = self.text.startswith("]", _SPACE.match(self.text, position).end())  # type: ignore[union-attr]
        position, closing = self._skip(position, "]") if empty else (position, ",")
        while closing == ",":
            start, value, position = self._value(position)
            yield self._line_of(start), value
            position, closing = self._skip(position, ",]")
        end = _SPACE.match(self.text, position).end()  # type: ignore[union-attr]
        if alone and end < len(self.text):
            raise DataError(f"{self.path}:{self._line_of(end)}: {self.text[end]!r}, expected the end of the file")
