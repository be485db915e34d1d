"""Writing files. A kill, a full disk or a missing permission never leaves half a file under its final name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError

from layalign.utils.errors import LayAlignError, OutputError, first_line


@contextmanager
def writing(what: str, left: str = "") -> Iterator[None]:
    """Turn every failure to write into an OutputError: `what` cannot be written, why, and what is `left` on the disk.

    torch reports a full disk as RuntimeError, safetensors as an error of its own, tokenizers as a bare Exception.
    """
    try:
        yield
    except LayAlignError:
        raise
    except Exception as error:
        if not isinstance(error, (OSError, RuntimeError, SafetensorError)) and type(error) is not Exception:
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise OutputError(f"{what}: cannot be written: {reason}{left and '; '}{left}") from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half of it.

    Raises:
        OutputError: it cannot be written; the old file, if there was one, is untouched.
    """
    temporary = path.with_name(path.name + ".unfinished")
    with writing(str(path)):
        try:
            with temporary.open("wb") as file:
                # File names that are not UTF-8 hold surrogates. Their escapes mean the same in JSON.
                file.write(content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace"))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into. After the block its files move into ``folder``, each complete or not at all."""
    with TemporaryDirectory(prefix=".unfinished-", dir=folder) as name:
        aside = Path(name)
        yield aside
        for path in sorted(path for path in aside.rglob("*") if path.is_file()):
            final = folder / path.relative_to(aside)
            final.parent.mkdir(exist_ok=True)
            path.replace(final)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():  # Windows cannot open a folder, and need not
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def usual_mode(folder: Path) -> int:
    """The permissions that a new file gets in a folder. safetensors restricts its files to their owner."""
    probe = folder / f".mode.{os.getpid()}"
    try:
        probe.touch()
        return probe.stat().st_mode & 0o777
    finally:
        probe.unlink(missing_ok=True)


def give_usual_modes(folder: Path) -> None:
    """Give a folder's safetensors files, which transformers wrote, the permissions that any new file gets there."""
    mode = usual_mode(folder)
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)
