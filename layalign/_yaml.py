"""Reading YAML that somebody wrote: plain data only, and one kind of error for all that can be wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from layalign.errors import ArgumentError

# A configuration has hundreds of values. Aliases of aliases stand for billions in a few lines.
MAX_VALUES, MAX_DEPTH, MAX_LENGTH = 10_000, 40, 2**18


def read_file(path: Path, argument: str = "config") -> Any:
    """The value that a YAML file holds; see :func:`read_text`."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ArgumentError(f"{argument}: {path}:{line} is not UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ArgumentError(f"{argument}: {path} cannot be read: {reason}") from error
    return read_text(text, f"{argument}: {path}")


def read_text(text: str, where: str) -> Any:
    """The value of a YAML text, without running anything: tags of Python objects are errors.

    Args:
        where: begins the error's text.

    Raises:
        ArgumentError: it is no YAML, holds a value that there is not (a 13th month), or is too large or deep when all
            aliases are written out.
    """
    if len(text) > MAX_LENGTH:
        raise ArgumentError(f"{where}: expected at most {MAX_LENGTH} characters, got {len(text)}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ArgumentError(f"{where} is not YAML: {' '.join(str(error).split())[:300]}") from error
    except RecursionError:
        raise ArgumentError(f"{where} is nested too deep") from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        # What PyYAML's own constructors raise for dates, numbers and tagged values that are none.
        raise ArgumentError(f"{where} is not YAML: {' '.join(str(error).split())[:300]}") from error
    _require_small(value, where)
    return value


def _require_small(value: Any, where: str) -> None:
    left, rest = MAX_VALUES, [(value, 0)]
    while rest:
        part, depth = rest.pop()
        left -= 1
        if left < 0 or depth > MAX_DEPTH:
            raise ArgumentError(f"{where}: expected at most {MAX_VALUES} values, {MAX_DEPTH} lists or mappings deep")
        if isinstance(part, dict):
            rest += [(inner, depth + 1) for pair in part.items() for inner in pair]
        elif isinstance(part, list | tuple | set):
            rest += [(inner, depth + 1) for inner in part]
