"""The manifest of a model folder: origin, measurements, and the checksum of each file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layalign.training.checkpoints import sha256
from layalign.utils.errors import CheckpointError
from layalign.utils.files import write_whole
from layalign.utils.reading import confined, read_json, require_regular

NAME = "layalign-weights.json"
FORMAT = 1


def write(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the manifest of a folder, with all of its files."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != NAME)
    entries = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}
    write_whole(folder / NAME, json.dumps({"format": FORMAT, **about, "files": entries}, indent=2) + "\n")


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, or None.

    Raises:
        CheckpointError: it is damaged, or from a later version of this library.
    """
    path = folder / NAME
    if not path.exists():
        return None
    found = read_json(path)
    texts = isinstance(found, dict) and all(isinstance(found.get(key), str) for key in ("source", "dtype"))
    if not texts or found.get("format") != FORMAT or not isinstance(found.get("files"), dict) or not found["files"]:
        raise CheckpointError(f"{path}: expected a manifest of format {FORMAT}; remove {folder} and create it again")
    return dict(found)


def require_unchanged(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Check that the files of a folder are unchanged.

    Raises:
        CheckpointError: one is missing or changed; the text names it.
    """
    again = f"; remove {folder} and create it again"
    for name, entry in manifest["files"].items():
        path = confined(folder, name, str(folder / NAME))
        try:
            size = require_regular(path, str(path)).st_size
        except OSError:
            raise CheckpointError(f"{path}: is missing{again}") from None
        if not isinstance(entry, dict) or size != entry.get("bytes") or sha256(path) != entry.get("sha256"):
            raise CheckpointError(f"{path}: is not what was written (SHA-256){again}")
