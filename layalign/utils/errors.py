"""The errors layalign raises. Each is also the builtin a caller would expect to catch."""

from __future__ import annotations

import operator
import reprlib
import sys
from collections.abc import Iterable
from math import inf
from typing import Any, NoReturn


class LayAlignError(Exception):
    """Base of every error raised by layalign; its text is one line that names the argument and what was expected."""


class ArgumentError(LayAlignError, ValueError):
    """An argument has the wrong shape, dtype, device or value."""


class DataError(LayAlignError, ValueError):
    """A data file cannot be used; the text starts with `file:line` if one line is at fault."""


class BackendError(LayAlignError, RuntimeError):
    """An explicitly requested backend cannot serve the call; the text gives the reason."""


class CheckpointError(LayAlignError, ValueError):
    """A checkpoint is missing, foreign, or does not fit the model."""


class OutputError(LayAlignError, OSError):
    """A file cannot be written (disk full, no permission); the text says what is left on the disk."""


class StoppedError(LayAlignError, RuntimeError):
    """Training was asked to stop (SIGTERM) and has saved a checkpoint; the text names it."""


class NonFiniteError(LayAlignError, ArithmeticError):
    """A loss, a gradient or logits are NaN or infinite; the text names the step and the tensor, or the samples.

    Attributes:
        rows: indices of the samples in the call, if logits are at fault.
        output: the result nevertheless, valid for the other samples; or None.
    """

    def __init__(self, text: str, rows: Iterable[int] = (), output: Any = None) -> None:
        super().__init__(text)
        self.rows, self.output = tuple(rows), output


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 60, 60


def shown(value: object, longest: int = 60) -> str:
    """Any value as one short line for an error's text.

    ``repr`` alone would take all memory for nested lists that share their parts.
    """
    try:
        text = " ".join(_SHORT.repr(value).split())
        text.encode("utf-8")
    except Exception:  # a number with too many digits to print, an object whose repr fails
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= longest else text[: longest - 3] + "..."


def first_line(error: BaseException, longest: int = 300) -> str:
    """The first line of another library's error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= longest else text[: longest - 3] + "..."


def refuse(name: str, expected: str, value: object) -> NoReturn:
    """Raise the error for an argument: ``NAME: expected EXPECTED, got VALUE``."""
    raise ArgumentError(f"{name}: expected {expected}, got {shown(value)}")


def whole_number(name: str, value: Any, least: float = -inf, most: float = 2**63 - 1) -> int:
    """``value`` as an int, if it is a whole number (of numpy or torch too) in the range; no bool, no fraction."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is None or not least <= number <= most:
        lower = "" if least == -inf else f" from {least} up"
        refuse(name, f"a whole number{lower}" if most >= 2**63 - 1 else f"{least}..{most}", value)
    return number


MAX_SIZE = 2**31 - 1  # largest width of a layer


def one_of(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Check that ``value`` is one of the words in ``allowed``."""
    allowed = tuple(allowed)
    if not isinstance(value, str) or value not in allowed:
        refuse(name, f"one of {', '.join(allowed)}", value)


def finite_number(name: str, value: Any, expected: str = "a finite number") -> float:
    """``value`` as a float, if it is a finite number; no bool, no text."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -FLOAT_MAX <= value <= FLOAT_MAX:
        refuse(name, expected, value)
    return float(value)


FLOAT_MAX = sys.float_info.max
