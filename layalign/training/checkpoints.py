"""Training checkpoints that are whole or not there: written aside, summed up, renamed.

A checkpoint is written into the folder `.unfinished` of the run. When all of it is on the disk, `manifest.json` is
added with the size and the SHA-256 of every file, and the folder gets its name `checkpoint-N` in one step. Whoever
reads one compares it with its manifest first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

from layalign._files import sync, write_whole
from layalign.names import UNFINISHED

logger = logging.getLogger("layalign")

MANIFEST = "manifest.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_VERSION = 1


def checkpoints(folder: str | Path) -> list[Path]:
    """The whole training checkpoints in a folder, oldest first; a damaged one is left out, with a warning."""
    found = []
    for path in _named(folder):
        wrong = problem(path)
        if wrong is None:
            found.append(path)
        else:
            logger.warning("%s: not a whole checkpoint, left out: %s", path, wrong)
    return found


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint: the first file that is missing or is not what the manifest says; None if whole.

    Every byte is read.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except OSError as error:
        return f"{MANIFEST}: {error.strerror}"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST}: damaged"
    if "trainer_state.json" not in files:
        return f"{MANIFEST}: names no trainer_state.json"
    for name, (size, digest) in files.items():
        path = folder / name
        try:
            if path.stat().st_size != size:
                return f"{name}: expected {size} bytes, got {path.stat().st_size}"
            if sha256(path) != digest:
                return f"{name}: its content is not what was written (SHA-256)"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def publish(staged: Path, final: Path) -> None:
    """Bring a checkpoint to the disk, write its manifest and give it its name, in that order.

    Raises:
        OSError: the disk did not take it.
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
    """Remove the oldest checkpoints until `limit` are left; `newest`, what was just written, and the best one stay."""
    named = _named(folder)
    # What bears a later step is damaged (else the run had gone on from it), and no reason to remove a whole one.
    present = named[: named.index(newest) + 1]
    keep = {newest} | {path for path in present if best is not None and path.name == Path(best).name}
    for path in present:
        if limit is None or len(present) <= max(limit, len(keep)):
            return
        if path not in keep:
            remove(path)
            present = [other for other in present if other != path]


def remove(folder: Path) -> None:
    """Remove a checkpoint in one step: it loses its name first, so that no half of it keeps one."""
    if not folder.exists():
        return
    aside = folder.parent / UNFINISHED / f"removed-{folder.name}"
    aside.parent.mkdir(exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def clear_unfinished(folder: Path) -> None:
    """Remove what a killed run had begun to write."""
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
        return digest.hexdigest()


def _named(folder: str | Path) -> list[Path]:
    """Folders that bear a checkpoint's name, oldest first."""
    root = Path(folder)
    matches = [(_CHECKPOINT.fullmatch(path.name), path) for path in root.iterdir()] if root.is_dir() else []
    return [path for _, path in sorted((int(match.group(1)), path) for match, path in matches if match)]


def check_writable(folder: Path) -> None:
    """Make the folder and write one byte into it, before hours of work rely on it.

    Raises:
        OSError: it cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f"{UNFINISHED}.{os.getpid()}"
    try:
        probe.write_bytes(b"\0")
    finally:
        probe.unlink(missing_ok=True)
