"""One run at a time in a folder.

The holder has the operating system's lock on the folder's file `.lock`, which ends with its process. It writes into
that file who it is, and a new sign of life every few seconds. The lock decides. The signs of life are read only where
the lock cannot tell: the file system has no locks, or another machine, which the lock may not reach, wrote the file.

`filelock` is not used: its behaviour in forked processes and on file systems without locks differs between releases.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from layalign.utils.errors import ArgumentError
from layalign.utils.files import writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("layalign")

LOCK = ".lock"
BEAT, SILENCE = 5.0, 30.0  # seconds between signs of life; seconds without one after which a holder counts as dead
_SIZE = 1024  # bytes of a record, padded with spaces so that every write replaces all of it


class _Hold:
    """A folder that this process holds: the open file, the thread that took it, how often, and the heartbeat."""

    def __init__(self, path: Path, handle: int) -> None:
        self.path, self.handle = path, handle
        self.thread, self.depth = threading.get_ident(), 1
        since = datetime.now(timezone.utc).isoformat(sep=" ", timespec="seconds")
        self.record: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "beat": 0}
        self.ended = threading.Event()
        self.beating = threading.Thread(target=self._beat, name="layalign-lock", daemon=True)

    def write(self) -> None:
        self.record["beat"] += 1
        os.lseek(self.handle, 0, os.SEEK_SET)
        os.write(self.handle, json.dumps(self.record).encode().ljust(_SIZE)[:_SIZE])
        os.fsync(self.handle)  # else another machine does not see it

    def _beat(self) -> None:
        while not self.ended.wait(BEAT):
            with suppress(OSError):
                self.write()

    def end(self) -> None:
        self.ended.set()
        self.beating.join(BEAT)
        if self.beating.is_alive():  # the file system hangs; the lock ends with the process
            return
        with suppress(OSError):
            os.ftruncate(self.handle, 0)  # Windows cannot remove an open file; empty, it names nobody
            if _is_at(self.handle, self.path):
                self.path.unlink()
        os.close(self.handle)


_holds: dict[Path, _Hold] = {}
_changing = threading.Lock()


def _forget() -> None:
    """A forked process holds nothing: it closes the inherited files, which would keep the locks alive."""
    global _changing
    _changing = threading.Lock()
    for hold in _holds.values():
        os.close(hold.handle)
    _holds.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def held(folder: str | Path, name: str = "output_dir") -> Iterator[None]:
    """Within the block, the folder belongs to this process alone. It is created if needed.

    The thread that holds it may take it again.

    Args:
        folder: the folder that a run reads and writes.
        name: the argument's name in errors.

    Raises:
        ArgumentError: another process, or another thread of this one, holds it; the text says who and since when.
        OutputError: the folder cannot be made or written to.
    """
    path = Path(os.path.realpath(folder)) / LOCK
    with _changing:
        hold = _holds.get(path)
        if hold is None:
            hold = _holds[path] = _take(path, f"{name}: {folder}")
        elif hold.thread == threading.get_ident():
            hold.depth += 1
        else:
            raise _in_use(f"{name}: {folder}", hold.record)
    try:
        yield
    finally:
        with _changing:
            if _holds.get(path) is hold:  # not in a process that was forked within the block
                hold.depth -= 1
                if hold.depth == 0:
                    del _holds[path]
                    hold.end()


def _take(path: Path, what: str) -> _Hold:
    while True:
        with writing(what):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            sure = _lock(handle, path, what)
            if _is_at(handle, path):  # else the previous holder removed it when it ended: lock the new file
                _wait_for_silence(path, handle, sure, what)
                hold = _Hold(path, handle)
                with writing(what):
                    hold.write()
                if not sure:
                    _see_who_was_last(hold, what)
                hold.beating.start()
                return hold
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int, path: Path, what: str) -> bool:
    """Take the lock; False if the file system has none.

    Raises:
        ArgumentError: another process has it.
    """
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            os.lseek(handle, 1 << 20, os.SEEK_SET)  # past the record, so that others can read it
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            raise _in_use(what, _read(path)) from None
        logger.warning(
            "%s: its file system has no locks (%s): two runs in it are noticed by their signs of life alone",
            what, error.strerror,
        )  # fmt: skip
        return False
    return True


def _wait_for_silence(path: Path, handle: int, sure: bool, what: str) -> None:
    """Return once the process that wrote the record counts as dead.

    Raises:
        ArgumentError: it gives signs of life.
    """
    record = _read(path)
    if not record or (record.get("host") == socket.gethostname() and (sure or not _runs(record.get("pid")))):
        return
    left = SILENCE - max(_age(path, handle), 0.0)
    if left > 0:
        logger.warning("%s: waiting %.0f s for signs of life of %s", what, left, _who(record))
    end = time.monotonic() + left
    while time.monotonic() < end:
        time.sleep(min(1.0, SILENCE / 20))
        now = _read(path)
        if now and now != record:
            raise _in_use(what, now)


def _see_who_was_last(hold: _Hold, what: str) -> None:
    """Without a lock two runs may begin at once: the second one's record is the one that stays."""
    time.sleep(BEAT / 5)
    now = _read(hold.path)
    if now != hold.record:
        raise _in_use(what, now)


def _age(path: Path, handle: int) -> float:
    """Seconds since a file was written, by the file system's own clock."""
    try:
        with TemporaryFile(dir=path.parent) as probe:
            return os.fstat(probe.fileno()).st_mtime - os.fstat(handle).st_mtime
    except OSError:
        return 0.0


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _runs(pid: Any) -> bool:
    """Whether process ``pid`` of this machine runs."""
    if os.name == "nt" or not isinstance(pid, int) or pid <= 0:
        return True  # unknown; on Windows os.kill would end it
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _read(path: Path) -> dict[str, Any]:
    """The record, from a file opened again: only that makes a network file system look for changes."""
    try:
        with path.open("rb") as file:
            record = json.loads(file.read(_SIZE))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _who(record: dict[str, Any]) -> str:
    if not record:
        return f"another process, which {LOCK} does not name"
    return f"process {record.get('pid')} on {record.get('host')}, since {record.get('since')}"


def _in_use(what: str, record: dict[str, Any]) -> ArgumentError:
    return ArgumentError(f"{what} is in use by {_who(record)}; expected another folder, or that run to end first")
