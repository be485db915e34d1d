"""Reading files that may be damaged or malicious. Whatever is wrong with a file becomes one error that names it."""

from __future__ import annotations

import json
import os
import stat
import struct
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from layalign.utils.errors import CheckpointError, LayAlignError, shown
from layalign.utils.limits import MAX_JSON_BYTES, MAX_JSON_DEPTH

Kind = type[LayAlignError]
_TOO_DEEP = object()


def read_bytes(
    path: Path, *, where: str | None = None, most: int = MAX_JSON_BYTES, error: Kind = CheckpointError
) -> bytes:
    """The content of a regular file.

    Args:
        where: begins the error's text; the path by default.
        most: largest size in bytes, checked before reading.
        error: the class of the error.

    Raises:
        LayAlignError: of class ``error``: the file does not exist, is not regular (a pipe, /dev/zero), is too large, or
            cannot be read.
    """
    where = where or str(path)
    try:
        # Before opening: that alone would wait for the other end of a pipe, and makes some devices act.
        require_regular(path, where, error)
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > most:
                raise error(f"{where}: expected at most {most} bytes, got {size}")
            content = file.read(most + 1)
    except (OSError, ValueError) as problem:
        if isinstance(problem, LayAlignError):
            raise
        raise error(f"{where} cannot be read: {getattr(problem, 'strerror', None) or problem}") from problem
    if len(content) > most:  # it grows, or its file system tells no sizes
        raise error(f"{where}: expected at most {most} bytes")
    return content


def read_text(
    path: Path, *, where: str | None = None, most: int = MAX_JSON_BYTES, error: Kind = CheckpointError
) -> str:
    """The text of a UTF-8 file, as :func:`read_bytes`. If it is not UTF-8, the error names the line."""
    where = where or str(path)
    try:
        return read_bytes(path, where=where, most=most, error=error).decode("utf-8")
    except UnicodeDecodeError as problem:
        line = problem.object.count(b"\n", 0, problem.start) + 1
        raise error(f"{where}:{line} is not UTF-8") from None


def read_json(
    path: Path, *, where: str | None = None, most: int = MAX_JSON_BYTES, error: Kind = CheckpointError
) -> Any:
    """The value of a JSON file, as :func:`read_text` and :func:`parse_json`."""
    where = where or str(path)
    return parse_json(read_text(path, where=where, most=most, error=error), where, error=error)


def parse_json(text: str, where: str, *, error: Kind = CheckpointError) -> Any:
    """The value of a JSON text.

    Raises:
        LayAlignError: of class ``error``: the text is not JSON, has a number of too many digits, or is nested too deep.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as problem:
        raise error(f"{where} is not JSON: line {problem.lineno}: {problem.msg}") from None
    except ValueError as problem:  # more digits than Python reads
        raise error(f"{where} is not JSON: {str(problem).split(' for ')[0].split(';')[0]}") from None
    except RecursionError:
        value = _TOO_DEEP
    if value is _TOO_DEEP or is_deeper(value, text, MAX_JSON_DEPTH):
        raise error(f"{where}: expected at most {MAX_JSON_DEPTH} nested lists and mappings")
    return value


class Cursor:
    """A read position in the bytes of a file, at first 0. Reading past the end is an error.

    Args:
        path: the file, for errors.
        data: its bytes, or an mmap of it.
        error: the class of the errors.
    """

    def __init__(self, path: Path, data: Any, error: Kind = CheckpointError) -> None:
        self.path, self.data, self.size, self.at, self._kind = path, data, len(data), 0, error

    def error(self, text: str) -> LayAlignError:
        """An error that names the file."""
        return self._kind(f"{self.path}: {text}")

    def bytes(self, count: int) -> bytes:
        """The next bytes."""
        if not 0 <= count <= self.size - self.at:
            raise self.error(f"expected {count} more bytes at {self.at}, got {self.size - self.at}: it is cut off")
        self.at += count
        return bytes(self.data[self.at - count : self.at])

    def take(self, form: str) -> Any:
        """The next number, little-endian; ``form`` is its type as in `struct`."""
        return struct.unpack(f"<{form}", self.bytes(struct.calcsize(f"<{form}")))[0]

    def text(self, length: str) -> str:
        """The next UTF-8 text, after its length, a number of type ``length``."""
        try:
            return self.bytes(self.take(length)).decode()
        except UnicodeDecodeError:
            raise self.error(f"expected UTF-8 before byte {self.at}") from None


def is_deeper(value: Any, text: str, most: int) -> bool:
    """Whether the value of a JSON text has more than ``most`` levels of nested lists and mappings."""
    if text.count("[") + text.count("{") <= most:
        return False
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(most):
        inner = (each for outer in level for each in (outer.values() if isinstance(outer, dict) else outer))
        level = [each for each in inner if isinstance(each, dict | list)]
    return bool(level)


def require_regular(path: Path, where: str, error: Kind = CheckpointError) -> os.stat_result:
    """The ``stat`` of a regular file, which is not opened.

    Raises:
        LayAlignError: of class ``error``: it is a folder, a pipe, a socket or a device.
        OSError, ValueError: the file does not exist, or its name is not possible.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise error(f"{where}: expected a file, got {kinds.get(stat.S_IFMT(state.st_mode), 'a device')}")
    return state


def confined(folder: Path, name: Any, where: str, *, error: Kind = CheckpointError) -> Path:
    """The path of a file in ``folder``, by the relative name that another file there gives. Links are not followed.

    Raises:
        LayAlignError: of class ``error``: the name leads out of the folder, or is not one.
    """
    good = isinstance(name, str) and 0 < len(name) < 4096 and "\0" not in name and "\\" not in name
    if good:
        path, drive = PurePosixPath(name), PureWindowsPath(name).drive
        good = bool(path.parts) and not path.is_absolute() and ".." not in path.parts and not drive
        good = good and path.as_posix() == name  # one name for each file
    if not good:
        raise error(f"{where}: expected the name of a file in its folder, got {shown(name)}")
    return folder / name
