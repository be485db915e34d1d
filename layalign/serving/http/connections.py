"""Connections that wait for their client: how long each may, how many there may be, and how much is logged of them."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from layalign.serving.http.metrics import Metrics
from layalign.serving.http.settings import ServeSettings

logger = logging.getLogger(__name__)
SPARE_FILES = 256  # descriptors for all that is no connection of a client
HEADER = 16 * 1024  # bytes; h11's own limit
_END = re.compile(rb"\n\r?\n")
BACKLOG = 512  # connections that are taken from the system at once


class Waiting:
    """The connections that wait for their client, those that have waited longest first.

    Args:
        most: how many there may be.
        settings: how long they may wait.
        metrics: where they are counted.
    """

    def __init__(self, most: int, settings: ServeSettings, metrics: Metrics) -> None:
        self.most, self.settings, self.metrics = most, settings, metrics
        self.connections: dict[Connection, None] = {}
        metrics.waiting_connections.set_function(lambda: len(self.connections))

    def add(self, connection: Connection) -> None:
        """Take one in; another one is closed for it where there is no place."""
        self.connections[connection] = None
        if len(self.connections) > self.most:
            next(iter(self.connections)).drop("crowded")


class Connection(H11Protocol):
    """uvicorn's connection that does not wait for its client for ever.

    It waits while the next request is not there (header and body), and while an answer is not read. A request that is
    whole never waits: what then takes its time is the server, which bounds that elsewhere.

    Args:
        waiting: the connections of this server that do.
        kwargs: uvicorn's.
    """

    def __init__(self, waiting: Waiting, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._waiting, self._for = waiting, ""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._waiting.metrics.connections.inc()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self._waiting.metrics.connections.dec()
        self._wait_for("")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        # h11 looks only at the length of what is not whole.
        if self.conn.their_state is h11.IDLE and len(data) > HEADER and not _END.search(data, 0, HEADER):
            self.send_400_response("Header too long.")
            return
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._look()

    def send_400_response(self, msg: str) -> None:
        """The answer to what is no HTTP; none in the middle of another answer or behind one."""
        self._waiting.metrics.malformed.inc()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.abort()
        if self.cycle is not None and not self.cycle.response_complete:  # uvicorn would answer a second time
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def drop(self, reason: str) -> None:
        """End it at once."""
        self._waiting.metrics.closed.labels(reason).inc()
        self._wait_for("")
        self.transport.abort()

    def _look(self) -> None:
        if self.transport.is_closing():
            return
        if self.flow.write_paused:
            self._wait_for("reading")
        elif self.cycle is None or self.cycle.response_complete:
            self._wait_for("header")
        else:
            self._wait_for("body" if self.cycle.more_body else "")

    def _wait_for(self, what: str) -> None:
        if what == self._for:
            return
        self._for = what
        if self._timer is not None:
            self._timer.cancel()
        settings = self._waiting.settings
        # The time of a body is the guard's, who answers 408.
        seconds = {"header": settings.header_timeout, "reading": settings.timeout}.get(what)
        self._timer = None if seconds is None else self.loop.call_later(seconds, self.drop, what)
        self._waiting.connections.pop(self, None)
        if what:
            self._waiting.add(self)


class Seldom(logging.Filter):
    """Lets few lines a minute through from each place in the code; the next one tells how many were left out.

    Args:
        lines: so many.
    """

    def __init__(self, lines: int = 5) -> None:
        super().__init__()
        self.lines = lines
        self._seen: dict[tuple[str, int], tuple[float, int]] = {}  # place: begin of its minute, lines in it

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is let through."""
        now, place = time.monotonic(), (record.pathname, record.lineno)
        since, count = self._seen.get(place, (-math.inf, 0))
        if now - since >= 60:
            if count > self.lines:
                record.msg, record.args = f"{record.getMessage()} ({count - self.lines} more were left out)", None
            since, count = now, 0
        self._seen[place] = since, count + 1
        return count < self.lines


def room(settings: ServeSettings) -> int:
    """How many connections may wait: `max_idle`, or as many as the process may have open files for."""
    try:
        import resource
    except ImportError:  # not a Unix
        return settings.max_idle
    others = settings.max_open + SPARE_FILES + BACKLOG
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.max_idle + others
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return settings.max_idle
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
    most = max(allowed - others, 16)
    if most < settings.max_idle:
        logger.warning("max_idle: %d connections may wait, because the process may open %d files", most, allowed)
    return min(most, settings.max_idle)
