"""Atomic training checkpoints: a folder `checkpoint-N` is complete, or it does not exist.

A checkpoint is written into the run's folder `.unfinished`. When all files are on the disk, `manifest.json` is added
with the size and the SHA-256 of each, and the folder is renamed to `checkpoint-N`. Readers verify the manifest first.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from transformers import TrainerState

from layalign.modeling.checkpoint import CONFIG, WEIGHTS
from layalign.modeling.names import UNFINISHED
from layalign.utils.errors import CheckpointError, first_line, shown
from layalign.utils.files import sync, write_whole
from layalign.utils.reading import confined, read_json, require_regular

logger = logging.getLogger("layalign")

MANIFEST = "manifest.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_VERSION = 1
NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt", CONFIG)  # besides weights and random number states
_RANDOM = re.compile(r"rng_state(_\d+)?\.pth")
_IS_READ = re.compile(r".*\.(safetensors|index\.json|pt|pth|bin)|(generation_config|run)\.json")


def checkpoints(folder: str | Path) -> list[Path]:
    """The complete training checkpoints in a folder, oldest first; damaged ones are skipped with a warning."""
    found = []
    for path in _named(folder):
        wrong = problem(path)
        if wrong is None:
            found.append(path)
        else:
            logger.warning("%s: not a complete checkpoint, skipped: %s", path, wrong)
    return found


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None.

    Reports the first file that is missing, differs from the manifest, or cannot be resumed from. Reads every byte.
    """
    try:
        files = _manifest(folder)
        for name, (size, digest) in files.items():
            path = confined(folder, name, MANIFEST)
            if not path.resolve().is_relative_to(folder.resolve()):
                return f"{name}: expected a file in the checkpoint, got a link to outside"
            if (found := require_regular(path, name).st_size) != size:
                return f"{name}: expected {size} bytes, got {found}"
            if sha256(path) != digest:
                return f"{name}: its content is not what was written (SHA-256 differs)"
        return _missing(folder, files) or _unnamed(folder, files) or _state_problem(folder)
    except CheckpointError as error:
        return str(error)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a link to itself, in older Pythons
        return f"{name}: {getattr(error, 'strerror', None) or error}"


def _manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of each file by its name."""
    path = folder / MANIFEST
    if not os.path.lexists(path):
        raise CheckpointError(f"{MANIFEST}: {os.strerror(errno.ENOENT)}")
    content = read_json(path, where=f"{MANIFEST}: damaged: it")
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict):
        raise CheckpointError(f"{MANIFEST}: damaged: expected a mapping of files")
    found = {}
    for name, entry in files.items():
        size, digest = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if not isinstance(size, int) or isinstance(size, bool) or size < 0 or not isinstance(digest, str):
            raise CheckpointError(f"{MANIFEST}: damaged: {shown(name)}: expected its size and its SHA-256")
        found[name] = size, digest
    return found


def _missing(folder: Path, files: Collection[str]) -> str | None:
    """A file that resuming needs and the manifest lacks: transformers would silently start with fresh moments."""
    for name in NEEDED:
        if name not in files:
            return f"{MANIFEST}: names no {name}"
    if not any(_RANDOM.fullmatch(name) for name in files):
        return f"{MANIFEST}: names no rng_state.pth"
    if WEIGHTS in files:
        return None
    index = f"{WEIGHTS}.index.json"
    if index not in files:
        return f"{MANIFEST}: names no {WEIGHTS}"
    content = read_json(folder / index, where=index)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not shards:
        return f"{index}: expected a mapping of weights to files"
    absent = next((shard for shard in shards.values() if shard not in files), None)
    return None if absent is None else f"{MANIFEST}: names no {shown(absent)}"


def _state_problem(folder: Path) -> str | None:
    """A `trainer_state.json` that makes transformers fail, or silently start from step 0."""
    name = "trainer_state.json"
    step = content.get("global_step") if isinstance(content := read_json(folder / name, where=name), dict) else None
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        return f"{name}: expected a global_step, got {shown(step)}"
    try:
        TrainerState.load_from_json(str(folder / name))
    except Exception as error:  # fields that this release does not know, values of another type
        return f"{name}: transformers cannot read it: {first_line(error)}"
    return None


def _unnamed(folder: Path, files: Collection[str]) -> str | None:
    """A file that loading would read although the manifest does not name it."""
    for path in sorted(folder.iterdir()):
        if _IS_READ.fullmatch(path.name) and path.name not in files:
            return f"{path.name}: the manifest does not name it"
    return None


def publish(staged: Path, final: Path) -> None:
    """Sync a checkpoint to the disk, write its manifest and rename it, in that order.

    Raises:
        OSError: the disk refuses.
    """
    files = {}
    for path in sorted(path for path in staged.rglob("*") if path.is_file()):
        sync(path)
        files[path.relative_to(staged).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
    write_whole(staged / MANIFEST, json.dumps({"version": _VERSION, "files": files}, indent=1) + "\n")
    for path in staged.rglob("*"):
        if path.is_dir():
            sync(path)
    sync(staged)
    remove(final)  # a damaged one of the same step, or one that an earlier run in this folder left
    staged.rename(final)
    sync(final.parent)


def rotate(folder: Path, newest: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints until `limit` are left; `newest` (just written) and `best` are always kept."""
    named = _named(folder)
    # A checkpoint of a later step is damaged, or the run would have resumed from it. It does not count towards `limit`.
    present = named[: named.index(newest) + 1]
    keep = {newest} | {path for path in present if best is not None and path.name == Path(best).name}
    for path in present:
        if limit is None or len(present) <= max(limit, len(keep)):
            return
        if path not in keep:
            remove(path)
            present = [other for other in present if other != path]


def remove(folder: Path) -> None:
    """Remove a checkpoint atomically: it is renamed first, so that no partial folder keeps the name."""
    if not folder.exists():
        return
    aside = folder.parent / UNFINISHED / f"removed-{folder.name}"
    aside.parent.mkdir(exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def clear_unfinished(folder: Path) -> None:
    """Remove what a killed run left half-written."""
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
        return digest.hexdigest()


def _named(folder: str | Path) -> list[Path]:
    """Folders named `checkpoint-N`, oldest first."""
    root = Path(folder)
    matches = [(_CHECKPOINT.fullmatch(path.name), path) for path in root.iterdir()] if root.is_dir() else []
    return [path for _, path in sorted((int(match.group(1)), path) for match, path in matches if match)]


def check_writable(folder: Path) -> None:
    """Create the folder and write one byte into it, so that a run fails now rather than at its first checkpoint.

    The lock does not show that: a killed run leaves its file, which takes neither space nor the right to create one.

    Raises:
        OSError: it cannot be created or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f"{UNFINISHED}.{os.getpid()}"
    try:
        probe.write_bytes(b"\0")
    finally:
        probe.unlink(missing_ok=True)
