"""Reading files that may be damaged, or made to do harm: whatever is wrong with one is one error that names it."""

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
    """What a regular file holds.

    Args:
        where: begins the error's text; the path by default.
        most: bytes that it may have; looked at before any is read.
        error: the class of the error.

    Raises:
        LayAlignError: of class ``error``: there is no such file, it is no regular file (a pipe, /dev/zero), it is too
            large, or the system does not give it.
    """
    where = where or str(path)
    try:
        # Before opening: that alone waits for the other end of a pipe, and makes some devices do things.
        require_regular(path, where, error)
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > most:
                raise error(f"{where}: expected at most {most} bytes, got {size}")
            found = file.read(most + 1)
    except (OSError, ValueError) as problem:
        if isinstance(problem, LayAlignError):
            raise
        raise error(f"{where} cannot be read: {getattr(problem, 'strerror', None) or problem}") from problem
    if len(found) > most:  # it grows, or is of a file system that tells no sizes
        raise error(f"{where}: expected at most {most} bytes")
    return found


def read_text(
    path: Path, *, where: str | None = None, most: int = MAX_JSON_BYTES, error: Kind = CheckpointError
) -> str:
    """The text of a file in UTF-8; as :func:`read_bytes`, and what is not UTF-8 is an error that names the line."""
    where = where or str(path)
    try:
        return read_bytes(path, where=where, most=most, error=error).decode("utf-8")
    except UnicodeDecodeError as problem:
        line = problem.object.count(b"\n", 0, problem.start) + 1
        raise error(f"{where}:{line} is not UTF-8") from None


def read_json(
    path: Path, *, where: str | None = None, most: int = MAX_JSON_BYTES, error: Kind = CheckpointError
) -> Any:
    """The value of a JSON file; as :func:`read_text` and :func:`parse_json`."""
    where = where or str(path)
    return parse_json(read_text(path, where=where, most=most, error=error), where, error=error)


def parse_json(text: str, where: str, *, error: Kind = CheckpointError) -> Any:
    """The value of a JSON text.

    Raises:
        LayAlignError: of class ``error``: it is no JSON, has a number of too many digits, or is nested too deep.
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
        raise error(f"{where}: expected at most {MAX_JSON_DEPTH} lists and mappings in each other")
    return value


class Cursor:
    """A place in the bytes of a file that is read from its start; what reaches behind its end is an error.

    Args:
        path: of the file, for errors.
        data: its bytes, or a map of them.
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
        """The next number, little-endian, as `struct` names its type."""
        return struct.unpack(f"<{form}", self.bytes(struct.calcsize(f"<{form}")))[0]

    def text(self, length: str) -> str:
        """The next text in UTF-8, behind its length, a number of type ``length``."""
        try:
            return self.bytes(self.take(length)).decode()
        except UnicodeDecodeError:
            raise self.error(f"expected UTF-8 before byte {self.at}") from None


def is_deeper(value: Any, text: str, most: int) -> bool:
    """Whether the value of a JSON text has more than ``most`` lists and mappings in each other."""
    if text.count("[") + text.count("{") <= most:
        return False
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(most):
        inner = (each for outer in level for each in (outer.values() if isinstance(outer, dict) else outer))
        level = [each for each in inner if isinstance(each, dict | list)]
    return bool(level)


def require_regular(path: Path, where: str, error: Kind = CheckpointError) -> os.stat_result:
    """The state of a regular file, found without opening it.

    Raises:
        LayAlignError: of class ``error``: it is a folder, a pipe, a socket or a device.
        OSError, ValueError: there is no such file, or nothing can have this name.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise error(f"{where}: expected a file, got {kinds.get(stat.S_IFMT(state.st_mode), 'a device')}")
    return state


def confined(folder: Path, name: Any, where: str, *, error: Kind = CheckpointError) -> Path:
    """The path of a file that a file of ``folder`` names: a relative one, in the folder. Links are not looked at.

    Raises:
        LayAlignError: of class ``error``: the name leads out of the folder, or is none.
    """
    good = isinstance(name, str) and 0 < len(name) < 4096 and "\0" not in name and "\\" not in name
    if good:
        path, drive = PurePosixPath(name), PureWindowsPath(name).drive
        good = bool(path.parts) and not path.is_absolute() and ".." not in path.parts and not drive
        good = good and path.as_posix() == name  # one name for each file
    if not good:
        raise error(f"{where}: expected the name of a file in its folder, got {shown(name)}")
    return folder / name
