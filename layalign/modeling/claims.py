"""Checks of what a checkpoint's files claim, before anything is built or read for it, and before code is fetched."""

from __future__ import annotations

import logging
import os
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from layalign.utils.errors import ArgumentError, CheckpointError, shown
from layalign.utils.limits import (
    MAX_HEADER_BYTES,
    MAX_JSON_BYTES,
    MAX_LABELS,
    MAX_LAYERS,
    MAX_PARTS,
    MAX_POSITIONS,
    MAX_TOKENIZER_BYTES,
)
from layalign.utils.reading import require_regular

logger = logging.getLogger("layalign")

# Fields with the number of things to build, and its limit. The first pattern that matches counts.
_COUNTS = (
    (re.compile(r"n_layers?|num_layers|(\w+_)?layers|num_(\w+_)?(layers|blocks|stages)"), MAX_LAYERS),
    (re.compile(r"(n|num)_(\w+_)?(experts|heads|groups|codebooks|buckets)|(\w+_)?num_buckets"), MAX_PARTS),
    (re.compile(r"num_labels"), MAX_LABELS),
    (re.compile(r"n_positions|n_ctx|(\w+_)?max_(\w+_)?positions?(_embeddings)?|(\w+_)?max_distance"), MAX_POSITIONS),
)
# Attention functions of transformers itself. Any other name may be fetched as code.
_ATTENTION = ("eager", "sdpa", "flex_attention")
_ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_TOKENIZER = re.compile(r"(tokenizer|vocab)\.json|merges\.txt|vocab\.txt|.*\.(model|spm|bpe)")


def require_modest(name: str, values: Any) -> None:
    """Check that a configuration's numbers of layers, heads and other things to build are not too large.

    Args:
        name: where ``values`` are in the configuration; empty for all of it.
        values: the configuration, or a part of it.

    Raises:
        ArgumentError: one is too large; the text begins with its place.
    """
    for path, key, value in _entries(name, values):
        many = len(value) if isinstance(value, list) and key.endswith("layers") else value
        if not isinstance(many, int | float) or isinstance(many, bool):
            continue
        for pattern, most in _COUNTS:
            if pattern.fullmatch(key):
                if many > most:
                    raise ArgumentError(f"{path}: expected at most {most}, got {shown(many)}")
                break


def without_kernels(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """A configuration from a checkpoint, without attention functions that are not transformers' own.

    If the package `kernels` is installed, transformers would fetch and run the code that such a name stands for.
    """
    safe: dict[str, Any] = {}
    for key, value in values.items():
        if _is_kernel(key, value):
            logger.warning(
                "%s%s: %s is left out: a checkpoint brings no code; give attn_implementation to from_pretrained",
                name, key, shown(value),
            )  # fmt: skip
            continue
        safe[key] = without_kernels(f"{name}{key}.", value) if isinstance(value, dict) else value
    return safe


def names_kernels(values: Mapping[str, Any]) -> bool:
    """Whether :func:`without_kernels` leaves anything out."""
    return any(_is_kernel(key, value) for _, key, value in _entries("", values))


def _is_kernel(key: str, value: Any) -> bool:
    asked = value.values() if isinstance(value, dict) else [value]
    return key in _ATTENTION_KEYS and not all(each is None or each in _ATTENTION for each in asked)


def _entries(name: str, values: Any) -> Iterator[tuple[str, str, Any]]:
    """(path, key, value) of all entries of nested mappings."""
    rest = [(name, values)]
    while rest:
        where, mapping = rest.pop()
        for key, value in mapping.items() if isinstance(mapping, Mapping) else ():
            place = f"{where}{'.' if where else ''}{str(key)[:60]!r}".replace("'", "")
            yield place, str(key), value
            rest.append((place, value))


def require_files(folder: Path) -> None:
    """Check that the files from which a model or tokenizer is loaded are regular files of a possible size.

    A folder that does not exist or cannot be listed is not checked: loading from it raises the error.

    Raises:
        CheckpointError: one is a pipe or a device, or too large; the text names it.
    """
    if not folder.is_absolute():  # the name of a hub repository
        return
    try:
        entries = sorted(folder.iterdir())
    except (OSError, ValueError):
        return
    for path in entries:
        name = path.name
        weights, tokenizer = name.endswith(".safetensors"), _TOKENIZER.fullmatch(name)
        if not (weights or tokenizer or name.endswith((".json", ".bin", ".jinja", ".pt", ".pth"))) or path.is_dir():
            continue
        try:
            size = require_regular(path, str(path)).st_size
        except OSError:  # a link to nothing: no file of this name
            continue
        if weights:
            require_header(path)
        elif tokenizer or name.endswith((".json", ".jinja")):
            most = MAX_TOKENIZER_BYTES if tokenizer else MAX_JSON_BYTES
            if size > most:
                raise CheckpointError(f"{path}: expected at most {most} bytes, got {size}")


def require_header(path: Path | str) -> None:
    """Check the length of a safetensors file's header. Whether the file is valid shows when it is loaded.

    Raises:
        CheckpointError: the header is too long.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(8)
    except OSError:
        return
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if MAX_HEADER_BYTES < length <= os.path.getsize(path):
        raise CheckpointError(f"{path}: expected at most {MAX_HEADER_BYTES} bytes of names of tensors, got {length}")
