"""The versions this library is tested with, and what depends on the installed version of transformers."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from typing import Any

from layalign.utils.errors import ArgumentError

# Package -> the lowest and the newest minor version. pyproject.toml, noxfile.py and docs/versions.md say the same.
TESTED = {"transformers": ("5.0", "5.24"), "torch": ("2.6", "2.15")}

CACHE_NAMES = ("cache", "past_key_values")  # arguments and parts of outputs: from transformers 5.24 on, and before it


def minor_version(version: str) -> tuple[int, int]:
    """(major, minor) of a version; a text that is not a version counts as newer than all."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (sys.maxsize, 0)


def tested(package: str) -> str:
    """The tested versions of a package, as a text."""
    return " to ".join(TESTED[package])


def version_note() -> str:
    """Which transformers is installed and which were tested: the end of an error that another version may cause."""
    return f"transformers {metadata.version('transformers')} is installed; tested with {tested('transformers')}"


def note_if_untested() -> str:
    """:func:`version_note` as the end of any error, if the installed transformers is not among the tested ones."""
    try:
        installed = minor_version(metadata.version("transformers"))
    except metadata.PackageNotFoundError:
        return ""
    lowest, newest = map(minor_version, TESTED["transformers"])
    return "" if lowest <= installed <= newest else f"; {version_note()}"


@contextmanager
def importing() -> Iterator[None]:
    """For imports from transformers that a later version may rename: the error names the tested versions."""
    try:
        yield
    except ImportError as error:
        theirs = (error.name or "").startswith("transformers.") or "from 'transformers" in str(error)
        if not theirs or "tested with" in str(error):
            raise
        raise ImportError(f"{error}; {version_note()}", name=error.name, path=error.path) from error


def cache_name(function: Any) -> str:
    """The name under which ``function`` takes the cache.

    Raises:
        ArgumentError: it has no argument of a known name.
    """
    parameters = inspect.signature(function).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return generation_cache_name()
    name = getattr(function, "__qualname__", type(function).__name__)
    raise ArgumentError(f"{name}: expected an argument named {' or '.join(CACHE_NAMES)}; {version_note()}")


@functools.cache
def generation_cache_name() -> str:
    """The name under which the installed ``generate`` keeps its cache."""
    from transformers import GenerationMixin

    parameters = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    raise ArgumentError(f"generate: expected a cache named {' or '.join(CACHE_NAMES)}; {version_note()}")


def one_cache(*caches: Any) -> Any:
    """The cache, given under any of its names; None if there is none.

    Raises:
        ArgumentError: there are two different ones.
    """
    given = [cache for cache in caches if cache is not None]
    if any(cache is not given[0] for cache in given):
        raise ArgumentError(f"{', '.join(CACHE_NAMES)}: expected one cache under either name, got two")
    return given[0] if given else None


def take_cache(arguments: dict[str, Any]) -> Any:
    """Remove the cache from keyword arguments, whatever its name, and return it; None if there is none."""
    return one_cache(*(arguments.pop(name, None) for name in CACHE_NAMES))


def cache_of(output: Any) -> Any:
    """The cache in a model's output; None if there is none."""
    for name in CACHE_NAMES:  # the new name first: in newer outputs the old one is a property that logs a warning
        if hasattr(output, name):
            return getattr(output, name)
    require_no_unknown_cache(output)
    return None


def require_no_unknown_cache(arguments: Mapping[str, Any]) -> None:
    """Check that no argument, or part of an output, is a cache: one under an unknown name would be ignored.

    Raises:
        ArgumentError: one is; the text names the tested versions.
    """
    from transformers import Cache

    for name, value in arguments.items():
        if isinstance(value, Cache):
            raise ArgumentError(f"{name}: expected the cache as {' or '.join(CACHE_NAMES)}; {version_note()}")


def package_version(name: str = "layalign") -> str | None:
    """Version of an installed package; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        if name != "layalign":
            return None
    import layalign

    return getattr(layalign, "__version__", None)
